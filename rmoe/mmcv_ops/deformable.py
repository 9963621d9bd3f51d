"""Deformable convolution (1703.06211, 1811.11168), computed by torchvision, and
multi-scale deformable attention (2010.04159), by mmcv's own PyTorch function.

The ``columns`` and ``ones`` that mmcv passes as buffers are not used, because
torchvision has its own.
"""
from typing import Any

import torch
from torch import Tensor

from rmoe.mmcv_ops.torchvision_ops import exact, load


def deform_conv_forward(input: Tensor, weight: Tensor, offset: Tensor,
                        output: Tensor, columns: Tensor, ones: Tensor,
                        kW: int, kH: int, dW: int, dH: int, padW: int,
                        padH: int, dilationW: int, dilationH: int,
                        group: int, deformable_group: int, im2col_step: int
                        ) -> None:
    """Write the convolution (B, O, h, w) to ``output``."""
    output.copy_(_forward(
        input, weight, offset, None, None, dH, dW, padH, padW, dilationH,
        dilationW, group, deformable_group).view_as(output))


def deform_conv_backward_input(
        input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor,
        gradOffset: Tensor, weight: Tensor, columns: Tensor, kW: int, kH: int,
        dW: int, dH: int, padW: int, padH: int, dilationW: int,
        dilationH: int, group: int, deformable_group: int, im2col_step: int
) -> None:
    """Write the gradients of input and offset to ``gradInput`` and
    ``gradOffset``."""
    grad_input, _, grad_offset, _, _ = _backward(
        gradOutput, input, weight, offset, None, None, dH, dW, padH, padW,
        dilationH, dilationW, group, deformable_group)
    gradInput.copy_(grad_input)
    gradOffset.copy_(grad_offset)


def deform_conv_backward_parameters(
        input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor,
        columns: Tensor, ones: Tensor, kW: int, kH: int, dW: int, dH: int,
        padW: int, padH: int, dilationW: int, dilationH: int, group: int,
        deformable_group: int, scale: float, im2col_step: int) -> None:
    """Add ``scale`` times the weight's gradient to ``gradWeight``."""
    # The gradient of a weight does not depend on the weight.
    _, grad_weight, _, _, _ = _backward(
        gradOutput, input, torch.zeros_like(gradWeight), offset, None, None,
        dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    gradWeight.add_(grad_weight, alpha=scale)


def modulated_deform_conv_forward(
        input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor,
        offset: Tensor, mask: Tensor, output: Tensor, columns: Tensor,
        kernel_h: int, kernel_w: int, stride_h: int, stride_w: int,
        pad_h: int, pad_w: int, dilation_h: int, dilation_w: int, group: int,
        deformable_group: int, with_bias: bool) -> None:
    """Write the convolution (B, O, h, w) to ``output``. ``mask`` has a weight
    for each sampled value."""
    output.copy_(_forward(
        input, weight, offset, mask, bias if with_bias else None, stride_h,
        stride_w, pad_h, pad_w, dilation_h, dilation_w, group,
        deformable_group).view_as(output))


def modulated_deform_conv_backward(
        input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor,
        offset: Tensor, mask: Tensor, columns: Tensor, grad_input: Tensor,
        grad_weight: Tensor, grad_bias: Tensor, grad_offset: Tensor,
        grad_mask: Tensor, grad_output: Tensor, kernel_h: int, kernel_w: int,
        stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int,
        dilation_w: int, group: int, deformable_group: int, with_bias: bool
) -> None:
    """Write the gradients of input, weight, bias, offset and mask to the
    ``grad_*`` arguments that are named after them."""
    found = _backward(
        grad_output, input, weight, offset, mask,
        bias if with_bias else None, stride_h, stride_w, pad_h, pad_w,
        dilation_h, dilation_w, group, deformable_group)
    outputs = (grad_input, grad_weight, grad_offset, grad_mask, grad_bias)
    for output, gradient in zip(outputs[:4 + with_bias], found):
        output.copy_(gradient)


def _forward(input: Tensor, *rest: Any) -> Tensor:
    return load().deform_conv2d(*_arguments(input, *rest))


def _backward(grad_output: Tensor, *rest: Any
              ) -> tuple[Tensor, ...]:
    return load()._deform_conv2d_backward(
        exact(grad_output).contiguous(), *_arguments(*rest))


def _arguments(input: Tensor, weight: Tensor, offset: Tensor,
               mask: Tensor | None, bias: Tensor | None, *numbers: int
               ) -> tuple[Tensor | int | bool, ...]:
    """Arguments as torchvision takes them: zeros in the place of a missing mask
    or bias, and at the end whether the mask is to be used."""
    zeros = input.new_zeros
    tensors = (input, weight, offset,
               zeros(len(input), 1) if mask is None else mask,
               zeros(len(weight)) if bias is None else bias)
    return (*map(exact, tensors), *numbers, mask is not None)


def ms_deform_attn_forward(value: Tensor, spatial_shapes: Tensor,
                           level_start_index: Tensor,
                           sampling_loc: Tensor, attn_weight: Tensor,
                           im2col_step: int) -> Tensor:
    """Attention (B, Q, M * D) over values (B, keys, M, D); see mmcv's
    ``multi_scale_deformable_attn_pytorch``."""
    # Imported here, because mmcv.ops itself imports this module.
    from mmcv.ops.multi_scale_deform_attn import (
        multi_scale_deformable_attn_pytorch,
    )
    return multi_scale_deformable_attn_pytorch(
        value, spatial_shapes.tolist(), sampling_loc, attn_weight)


def ms_deform_attn_backward(value: Tensor, spatial_shapes: Tensor,
                            level_start_index: Tensor, sampling_loc: Tensor,
                            attn_weight: Tensor, grad_output: Tensor,
                            grad_value: Tensor, grad_sampling_loc: Tensor,
                            grad_attn_weight: Tensor, im2col_step: int
                            ) -> None:
    """Write the gradients to the last three ``grad_*`` arguments.

    The forward pass is computed again, because keeping its sampled values
    would need more memory than the rest of the layer.
    """
    inputs = [part.detach().requires_grad_()
              for part in (value, sampling_loc, attn_weight)]
    value, sampling_loc, attn_weight = inputs
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            value, spatial_shapes, level_start_index, sampling_loc,
            attn_weight, im2col_step)
    outputs = (grad_value, grad_sampling_loc, grad_attn_weight)
    for written, gradient in zip(outputs, torch.autograd.grad(
            output, inputs, grad_output)):
        written.copy_(gradient)
