"""A base class for modules with buffers that are never cast."""
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module with buffers that keep their type when the module is cast.

    ``model.bfloat16()`` casts every floating-point buffer. In bfloat16, a sum
    of many small steps stops growing, because each step is rounded away.

    Attributes:
        exact_buffers: names of the buffers that move to other devices with
            the module but are never cast.
    """
    exact_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor],
               recurse: bool = True) -> Any:
        kept = {name: getattr(self, name) for name in self.exact_buffers}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            device = getattr(self, name).device
            # A buffer on the meta device has no values to keep; it starts at
            # zero.
            setattr(self, name, torch.zeros_like(buffer, device=device)
                    if buffer.is_meta else buffer.to(device))
        return self
