"""Mixed precision in bfloat16, which needs no loss scaler, on any device."""
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

    ``torch.cuda.is_bf16_supported()`` is True in most versions of torch for
    older cards too, which only emulate bfloat16 and are faster in float16.
    The compute capability tells such cards apart in every version.
    """
    return (torch.cuda.is_bf16_supported() and
            torch.cuda.get_device_capability() >= (8, 0))


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """mmengine's OptimWrapper, with the same arguments, that runs the model
    under ``torch.autocast`` to bfloat16.

    bfloat16 has the range of float32. So no loss is scaled, and the state
    dict is that of OptimWrapper. The wrapper also works on the CPU, where
    mmengine's AmpOptimWrapper raises, and can resume a run that
    AmpOptimWrapper saved. The head of a detector gets the feature maps of its
    neck in float32, because mmdet rounds boxes to the type of the maps from
    which they are cut: in bfloat16 a place near 1,000 pixels would be rounded
    to a multiple of 4.
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
    """Context in which mmcv's NMS gets its boxes and scores in float32,
    because the compiled operator raises for bfloat16 on the CPU."""
    nms = sys.modules.get('mmcv.ops.nms')
    if nms is None:  # mmcv.ops was not imported, so the model is no detector.
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
