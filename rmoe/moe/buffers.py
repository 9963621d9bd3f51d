"""Buffers that keep their type."""
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose counters are not cast with it.

    ``model.bfloat16()`` casts every floating-point buffer, and a sum of many
    small steps in bfloat16 stands still.

    Attributes:
        exact_buffers: names of the buffers that move with the module and are
            never cast.
    """
    exact_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor],
               recurse: bool = True) -> Any:
        kept = {name: getattr(self, name) for name in self.exact_buffers}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            device = getattr(self, name).device
            # A counter that had no storage starts at zero.
            setattr(self, name, torch.zeros_like(buffer, device=device)
                    if buffer.is_meta else buffer.to(device))
        return self
