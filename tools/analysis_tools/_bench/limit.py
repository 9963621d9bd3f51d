"""Computes how fast a FFN could be on this machine: the limit in the tables.

The limit is the time for the operations that the layer must do and for the
bytes that it must move, at the rates that a matrix product and a copy reach,
which are measured in turns with the layer.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from _bench.passes import FORWARD, Run
from _bench.precision import now
from _bench.timing import DEVICE
from rmoe.moe.products import linear

PARAMETER_BYTES = 4
# 128 MiB, which is several times the size of a cache.
STREAM_ELEMENTS = 2**25


@dataclass(frozen=True)
class Rates:
    """The rates that a machine reaches.

    Attributes:
        multiply: operations per second of matrix products.
        stream: bytes per second, read and written, of a copy.
    """
    multiply: float
    stream: float


@dataclass(frozen=True)
class Work:
    """The work that a FFN must do.

    Attributes:
        flops: operations of matrix products; a multiply-add is two.
        bytes: bytes moved to and from memory.
    """
    flops: int
    bytes: int

    def seconds(self, rates: Rates) -> float:
        """The time of the operations plus that of the moved bytes, as if they
        could not overlap."""
        return self.flops / rates.multiply + self.bytes / rates.stream


def work_of_ffn(tokens: int, dim: int, hidden: int, mode: str,
                experts: int = 0, core: bool = True,
                rank: int | None = None, top_k: int = 1,
                activation_bytes: int | None = None) -> Work:
    """The work of one pass of a FFN, dense or MoE.

    There are T tokens, the widths D and H, E experts of which each token uses
    K (1 if the FFN is dense), and the rank R. The operations of the forward
    pass are

    - 4 T K D H for the two linear layers,
    - 2 T D E for the router,
    - 4 T K R (D + H) for low-rank residuals, applied beside the core.

    The backward pass has two products for each one of the forward pass. The
    addition of core and residuals is no product; the bytes that it reads are
    counted below.

    The number of weights P is 2 D H if the FFN is dense, E times that without
    a core, E + 1 times that with a core and full rank, and
    2 D H + 2 E R (D + H) with low rank. The elements moved are

    - forward: P read; the hidden activations written and read, 2 T K H; the
      input read and the output written, 2 T D. A MoE layer gathers its rows
      (input read, rows written and read) and combines them (outputs written
      and read, the result written), which is 4 T K D more.
    - backward: P read again and as many gradients written; the hidden
      activations read, their gradient written and read, 3 T K H; the output's
      gradient and the input read, the input's gradient written, 3 T D. A MoE
      layer gathers the gradient (read, written, read), reads its rows, and
      combines the rows' gradients (written, read, the result written), which
      is 5 T K D more, and has 2 T D in place of 3 T D.

    Biases, the activation function, the operations around the FFN, and the
    indices of the routing are left out. So no program reaches the limit.

    Args:
        tokens: T.
        dim: D.
        hidden: H.
        mode: 'forward' or 'forward+backward'.
        experts: E; 0 for the dense FFN.
        core: whether the experts have a core.
        rank: R; None for full rank.
        top_k: K.
        activation_bytes: bytes of an element of an activation; None for those
            of the precision in use. A parameter has 4.
    """
    if activation_bytes is None:
        activation_bytes = now().dtype.itemsize
    rows = tokens * top_k
    ffn = 2 * dim * hidden
    flops = 2 * rows * ffn + 2 * tokens * dim * experts
    weights = ffn
    if rank is not None:
        flops += 4 * rows * rank * (dim + hidden)
        weights += 2 * experts * rank * (dim + hidden)
    elif experts:
        weights = (experts + core) * ffn
    wide = 2 * rows * hidden
    narrow = (2 * tokens + (4 * rows if experts else 0)) * dim
    if mode != FORWARD:
        flops, weights = 3 * flops, 3 * weights
        wide += 3 * rows * hidden
        narrow += (2 * tokens + 5 * rows if experts else 3 * tokens) * dim
    return Work(flops, PARAMETER_BYTES * weights
                + activation_bytes * (wide + narrow))


class RateProbe:
    """Measures the rates on the CPU, with products of the shapes in a layer.

    On a CPU a product of one expert's size reaches a high rate, which is the
    highest that this layer can reach. A GPU needs larger products, see
    ceilings.py.

    Args:
        rows: number of rows that one expert gets.
        dim: D.
        hidden: H.
        times: how often each product is repeated in a turn. The operands are
            the same, so that they are in the cache and the time has no memory
            traffic in it.
    """

    def __init__(self, rows: int, dim: int, hidden: int, times: int) -> None:
        self.flops, self.times = 2 * rows * dim * hidden, times
        # The shapes (N, I) and (O, I) of the two factors. A linear layer has
        # three products. The one for the gradient of its input has the same
        # shape as the forward product of the other layer, so it is not
        # measured.
        self.shapes = {
            'fc1': ((rows, dim), (hidden, dim)),
            'fc2': ((rows, hidden), (dim, hidden)),
            'fc1 weight': ((hidden, rows), (dim, rows)),
            'fc2 weight': ((dim, rows), (hidden, rows)),
        }
        self.source, self.target = (
            torch.zeros(STREAM_ELEMENTS, device=DEVICE) for _ in range(2))

    def steps(self) -> dict[tuple[str, ...], Run]:
        """The steps to time, in turns with the layers."""
        steps: dict[tuple[str, ...], Run] = {
            ('stream', ): lambda: self.target.copy_(self.source)}
        for name, (left, right) in self.shapes.items():
            operands = [torch.randn(shape, device=DEVICE, dtype=now().dtype)
                        for shape in (left, right)]
            for kind, product in (('torch', F.linear), ('rmoe', linear)):
                steps[name, kind] = partial(self._repeat, product, *operands)
        return steps

    @torch.no_grad()
    def _repeat(self, product: Callable[[Tensor, Tensor], Tensor],
                left: Tensor, right: Tensor) -> None:
        for _ in range(self.times):
            product(left, right)

    def rates(self, seconds: dict, mode: str) -> Rates:
        """The rates from the seconds of the steps. For each product the faster
        of the two functions counts."""
        best = {name: min(seconds[name, kind] for kind in ('torch', 'rmoe'))
                for name in self.shapes}
        total, count = best['fc1'] + best['fc2'], 2
        if mode != FORWARD:
            total, count = 2 * total, 6
            total += best['fc1 weight'] + best['fc2 weight']
        return Rates(count * self.times * self.flops / total,
                     2 * self.source.nbytes / seconds['stream', ])
