"""How fast could it be? Operations and bytes, over what this machine does.

The time of a layer is bounded by what it must multiply and what it must move,
at the rates of matrix products and of a copy that take turns with it.
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
# 128 MiB: several times what a cache holds.
STREAM_ELEMENTS = 2**25


@dataclass(frozen=True)
class Rates:
    """What a machine reaches.

    Attributes:
        multiply: operations a second of matrix products.
        stream: bytes a second, read and written, of a copy.
    """
    multiply: float
    stream: float


@dataclass(frozen=True)
class Work:
    """What a FFN must do.

    Attributes:
        flops: of matrix products; a multiplication and an addition are two.
        bytes: to and from memory.
    """
    flops: int
    bytes: int

    def seconds(self, rates: Rates) -> float:
        """One after the other: moving does not hide behind multiplying."""
        return self.flops / rates.multiply + self.bytes / rates.stream


def work_of_ffn(tokens: int, dim: int, hidden: int, mode: str,
                experts: int = 0, core: bool = True,
                rank: int | None = None, top_k: int = 1,
                activation_bytes: int | None = None) -> Work:
    """Of one pass of a FFN, dense or MoE.

    With T tokens, D and H widths, E experts, K of them for each token (1 if
    dense), R the rank. Operations of the forward pass:

    - 4 T K D H of the two linear layers,
    - 2 T D E of the router,
    - 4 T K R (D + H) of low-rank residuals, applied beside the core.

    Backward has two products for each of the forward's. Adding a core and
    residuals is no product; what it reads counts below.

    Elements moved, P being the weights: 2 D H if dense, E times that without
    a core, E + 1 times with core and full rank, 2 D H + 2 E R (D + H) with
    low rank:

    - forward: P read; hidden activations written and read, 2 T K H; the
      input read and the output written, 2 T D. A MoE layer gathers its rows
      (input read, rows written and read) and combines them (outputs written
      and read, the result written): 4 T K D more.
    - backward: P read again and as many gradients written; the hidden
      activations read, their gradient written and read, 3 T K H; the output's
      gradient and the input read, the input's gradient written, 3 T D. A MoE
      layer gathers the gradient (read, written, read), reads its rows, and
      combines the rows' gradients (written, read, the result written):
      5 T K D and 2 T D in place of 3.

    Biases, the activation function, what stands around the FFN, and who goes
    where are left out: no program reaches the limit.

    Args:
        tokens: T.
        dim: D.
        hidden: H.
        mode: 'forward' or 'forward+backward'.
        experts: E; 0 for the dense FFN.
        core: whether experts have one.
        rank: R; None for full rank.
        top_k: K.
        activation_bytes: of an element of an activation; None for that of
            the precision in use. Parameters have 4.
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
    """Measures the rates for a layer's shapes, on the CPU.

    A product of one expert's size is fast there, and what it reaches is what
    this layer can. A GPU needs larger ones: see ceilings.py.

    Args:
        rows: that one expert gets.
        dim: D.
        hidden: H.
        times: that each product is done in a turn, on the same operands, so
            that it finds them in cache and counts no memory traffic.
    """

    def __init__(self, rows: int, dim: int, hidden: int, times: int) -> None:
        self.flops, self.times = 2 * rows * dim * hidden, times
        # (N, I) and (O, I). Of the three products of a linear layer, that
        # for the input's gradient has the shape of the other layer's forward.
        self.shapes = {
            'fc1': ((rows, dim), (hidden, dim)),
            'fc2': ((rows, hidden), (dim, hidden)),
            'fc1 weight': ((hidden, rows), (dim, rows)),
            'fc2 weight': ((dim, rows), (hidden, rows)),
        }
        self.source, self.target = (
            torch.zeros(STREAM_ELEMENTS, device=DEVICE) for _ in range(2))

    def steps(self) -> dict[tuple[str, ...], Run]:
        """To be interleaved with the layers."""
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
        """From the seconds of the steps, each product by the faster kind."""
        best = {name: min(seconds[name, kind] for kind in ('torch', 'rmoe'))
                for name in self.shapes}
        total, count = best['fc1'] + best['fc2'], 2
        if mode != FORWARD:
            total, count = 2 * total, 6
            total += best['fc1 weight'] + best['fc2 weight']
        return Rates(count * self.times * self.flops / total,
                     2 * self.source.nbytes / seconds['stream', ])
