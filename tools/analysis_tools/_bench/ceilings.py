"""What a GPU reaches at its best: large products, a large copy.

Products of one expert's size wait for their launch there, and would call slow
what is only small.
"""
from functools import partial
from typing import Any

import torch

from _bench.limit import RateProbe, Rates
from _bench.passes import Run
from _bench.precision import now
from _bench.timing import DEVICE

PRODUCT_SIDE = 8192
# 1 GiB: several times what a cache holds.
COPIED_ELEMENTS = 2**28
PRODUCT, COPY = ('ceiling', 'product'), ('ceiling', 'copy')


class Ceilings:
    """Measures the rates whatever the layer: of a square product in the
    precision in use, and of a copy."""

    def __init__(self) -> None:
        self.side = PRODUCT_SIDE
        self.factors = [torch.randn(self.side, self.side, device=DEVICE,
                                    dtype=now().dtype) for _ in range(2)]
        self.product = torch.empty_like(self.factors[0])
        self.source, self.target = (
            torch.zeros(COPIED_ELEMENTS, device=DEVICE) for _ in range(2))

    def steps(self) -> dict[tuple[str, ...], Run]:
        """To be interleaved with the layers."""
        return {PRODUCT: partial(torch.mm, *self.factors, out=self.product),
                COPY: partial(self.target.copy_, self.source)}

    def rates(self, seconds: dict[Any, float], mode: str) -> Rates:
        """From the seconds of the steps; the same in every mode."""
        return Rates(2 * self.side**3 / seconds[PRODUCT],
                     2 * self.source.nbytes / seconds[COPY])


def probe_of(tokens: int, dim: int, hidden: int, experts: int
             ) -> RateProbe | Ceilings:
    """What measures a limit here: for the shapes of a layer on the CPU, at
    the machine's best on a GPU."""
    if DEVICE == 'cuda':
        return Ceilings()
    return RateProbe(max(tokens // experts, 1), dim, hidden, experts)
