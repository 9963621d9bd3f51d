"""Mixed precision without a loss scaler, on any device."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from rmoe.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """mmengine's OptimWrapper, with its arguments, that runs the model under
    ``torch.autocast`` to bfloat16.

    bfloat16 has the range of float32: no loss is scaled, and the state is
    that of OptimWrapper. It works where mmengine's AmpOptimWrapper refuses
    to, on the CPU, and resumes what AmpOptimWrapper saved.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(
                device, torch.bfloat16):
            yield
