"""Mixed precision without a loss scaler, on any device."""
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from rmoe.engine.wrappers import unwrapped
from rmoe.registry import OPTIM_WRAPPERS


def gpu_has_bfloat16() -> bool:
    """Whether the current CUDA device computes in bfloat16.

    Most versions of torch answer yes for an older card as well, which
    emulates bfloat16 and is faster in float16. The compute capability tells
    them apart in every version.
    """
    return (torch.cuda.is_bf16_supported() and
            torch.cuda.get_device_capability() >= (8, 0))


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """mmengine's OptimWrapper, with its arguments, that runs the model under
    ``torch.autocast`` to bfloat16.

    bfloat16 has the range of float32: no loss is scaled, and the state is
    that of OptimWrapper. It works where mmengine's AmpOptimWrapper refuses
    to, on the CPU, and resumes what AmpOptimWrapper saved. Boxes keep their
    places: a detector's head gets the maps of its neck in float32, because
    mmdet rounds boxes to the type of the maps they are cut from, in bfloat16
    to the next 4 of 1,000 pixels.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        neck = getattr(unwrapped(model), 'neck', None)
        handle = neck and neck.register_forward_hook(_in_float32)
        try:
            with super().optim_context(model), float32_nms(), torch.autocast(
                    device, torch.bfloat16):
                yield
        finally:
            if handle:
                handle.remove()


def _in_float32(neck: nn.Module, inputs: tuple, maps: Any) -> tuple:
    return tuple(one.float() for one in maps)


@contextmanager
def float32_nms() -> Iterator[None]:
    """mmcv's compiled NMS refuses bfloat16 scores on the CPU."""
    nms = sys.modules.get('mmcv.ops.nms')
    if nms is None:  # no detector
        yield
        return
    operator = nms.NMSop
    forward = operator.forward

    def in_float32(ctx: Any, boxes: Tensor, scores: Tensor, *args: Any
                   ) -> Tensor:
        return forward(ctx, boxes.float(), scores.float(), *args)

    operator.forward = staticmethod(in_float32)
    try:
        yield
    finally:
        operator.forward = staticmethod(forward)
