"""Measures the highest rates of a GPU, with a large matrix product and a large
copy.

On a GPU, a product of one expert's size takes mostly the time of its launch.
So it would make the GPU look slow, although the product is only small.
"""
from functools import partial
from typing import Any

import torch

from _bench.limit import RateProbe, Rates
from _bench.passes import Run
from _bench.precision import now
from _bench.timing import DEVICE

PRODUCT_SIDE = 8192
# 1 GiB, which is several times the size of a cache.
COPIED_ELEMENTS = 2**28
PRODUCT, COPY = ('ceiling', 'product'), ('ceiling', 'copy')


class Ceilings:
    """Measures the rates of a square product, in the precision in use, and of
    a copy. They do not depend on the shapes of a layer."""

    def __init__(self) -> None:
        self.side = PRODUCT_SIDE
        self.factors = [torch.randn(self.side, self.side, device=DEVICE,
                                    dtype=now().dtype) for _ in range(2)]
        self.product = torch.empty_like(self.factors[0])
        self.source, self.target = (
            torch.zeros(COPIED_ELEMENTS, device=DEVICE) for _ in range(2))

    def steps(self) -> dict[tuple[str, ...], Run]:
        """The steps to time, in turns with the layers."""
        return {PRODUCT: partial(torch.mm, *self.factors, out=self.product),
                COPY: partial(self.target.copy_, self.source)}

    def rates(self, seconds: dict[Any, float], mode: str) -> Rates:
        """The rates from the seconds of the steps. They are the same in every
        mode."""
        return Rates(2 * self.side**3 / seconds[PRODUCT],
                     2 * self.source.nbytes / seconds[COPY])


def probe_of(tokens: int, dim: int, hidden: int, experts: int
             ) -> RateProbe | Ceilings:
    """The object that measures the rates of this machine: on the CPU for the
    shapes of a layer, on a GPU the highest ones."""
    if DEVICE == 'cuda':
        return Ceilings()
    return RateProbe(max(tokens // experts, 1), dim, hidden, experts)
