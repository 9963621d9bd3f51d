"""The stand-in for the module ``mmcv._ext``: functions with its names.

When mmcv is imported, it looks up every name that it knows in this module. A
name without a stand-in gives a function that raises when it is called.
"""
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from rmoe.mmcv_ops.boxes import bbox_overlaps, nms, nms_match, softnms
from rmoe.mmcv_ops.deformable import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from rmoe.mmcv_ops.focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
)
from rmoe.mmcv_ops.masked_conv import (
    masked_col2im_forward,
    masked_im2col_forward,
)
from rmoe.mmcv_ops.roi import (
    roi_align_backward,
    roi_align_forward,
    roi_pool_backward,
    roi_pool_forward,
)

# __getattr__ is listed, so that a module with ``from ... import *`` answers to
# all names too.
__all__ = [
    '__getattr__', 'bbox_overlaps', 'deform_conv_backward_input',
    'deform_conv_backward_parameters', 'deform_conv_forward',
    'get_compiler_version', 'get_compiling_cuda_version',
    'masked_col2im_forward', 'masked_im2col_forward',
    'modulated_deform_conv_backward', 'modulated_deform_conv_forward',
    'ms_deform_attn_backward', 'ms_deform_attn_forward', 'nms', 'nms_match',
    'roi_align_backward', 'roi_align_forward', 'roi_pool_backward',
    'roi_pool_forward', 'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward', 'softnms'
]


def get_compiler_version() -> str:
    """The compiler, for mmcv's report of its environment."""
    return "none: rmoe stands in for mmcv's operators"


def get_compiling_cuda_version() -> str:
    """The CUDA version, for mmcv's report of its environment. It is torch's,
    because operators of PyTorch and torchvision are used."""
    return torch.version.cuda or 'not available'


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith('__'):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"mmcv's operator {name} is compiled, this mmcv has no compiled "
            'operators, and rmoe has no stand-in for it. Install mmcv with '
            'its operators in the place of mmcv-lite; docs/environment.md '
            'says how')

    missing.__name__ = name
    return missing
