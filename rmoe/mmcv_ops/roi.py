"""Pooling of regions of feature maps. The (n, 5) regions are rows of image
index, x1, y1, x2, y2."""
import torch
from torch import Tensor

from rmoe.mmcv_ops.torchvision_ops import exact, load

AVERAGE = 1  # mmcv's number for the pool mode 'avg'


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor,
                      argmax_y: Tensor, argmax_x: Tensor,
                      aligned_height: int, aligned_width: int,
                      spatial_scale: float, sampling_ratio: int,
                      pool_mode: int, aligned: bool) -> None:
    """Write RoIAlign (1703.06870) of (B, C, H, W) maps to ``output``, of shape
    (n, C, h, w).

    Raises:
        NotImplementedError: for ``pool_mode='max'``, which torchvision lacks.
    """
    _check(pool_mode)
    output.copy_(load().roi_align(
        exact(input), exact(rois), spatial_scale, aligned_height,
        aligned_width, sampling_ratio, aligned))


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor,
                       argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int,
                       spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Write the gradient of the maps to ``grad_input``."""
    _check(pool_mode)
    grad_input.copy_(load()._roi_align_backward(
        exact(grad_output), exact(rois), spatial_scale, aligned_height,
        aligned_width, *grad_input.shape, sampling_ratio, aligned))


def _check(pool_mode: int) -> None:
    if pool_mode != AVERAGE:
        raise NotImplementedError(
            "RoIAlign with pool_mode='max' needs mmcv's compiled operators: "
            "set pool_mode='avg', or install mmcv with its operators in the "
            'place of mmcv-lite (docs/environment.md)')


def roi_pool_forward(input: Tensor, rois: Tensor, output: Tensor,
                     argmax: Tensor, pooled_height: int, pooled_width: int,
                     spatial_scale: float) -> None:
    """Write RoIPool (1504.08083) of (B, C, H, W) maps to ``output``, of shape
    (n, C, h, w).

    The index in its map at which each value stood is written to ``argmax``,
    or -1 for an empty bin. torchvision's operator cannot be used: it rounds
    the edges of regions, mmcv those of bins. A slow loop over regions is
    enough, because few models use this operator.
    """
    height, width = input.shape[2:]
    for n, (image, *corners) in enumerate(rois.tolist()):
        rows = _bins(corners[1], corners[3], spatial_scale, pooled_height,
                     height)
        columns = _bins(corners[0], corners[2], spatial_scale, pooled_width,
                        width)
        feature = input[int(image)]
        for y, (top, bottom) in enumerate(rows):
            for x, (left, right) in enumerate(columns):
                part = feature[:, top:bottom, left:right].flatten(1)
                if part.numel() == 0:
                    output[n, :, y, x], argmax[n, :, y, x] = 0, -1
                    continue
                output[n, :, y, x], at = part.max(1)
                argmax[n, :, y, x] = (
                    (top + at // (right - left)) * width +
                    left + at % (right - left)).int()


def _bins(start: float, end: float, scale: float, count: int, size: int
          ) -> list[tuple[int, int]]:
    """For each bin, its first pixel along one axis and the one after its last.
    Bins overlap where an edge lies inside a pixel."""
    # Computed in float32 as in mmcv's kernel, because another rounding can
    # move an edge by a pixel.
    begin, finish = (torch.tensor(value, dtype=torch.float32) * scale
                     for value in (start, end + 1))
    if finish <= begin:
        return [(0, 0)] * count
    edges = torch.arange(count + 1) * ((finish - begin) / count) + begin
    first = edges[:-1].floor().clamp(0, size).int().tolist()
    last = edges[1:].ceil().clamp(0, size).int().tolist()
    return list(zip(first, last))


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor,
                      grad_input: Tensor, pooled_height: int,
                      pooled_width: int, spatial_scale: float) -> None:
    """Add each gradient to the place in ``grad_input`` where its maximum
    stood."""
    images = rois[:, 0].long()
    flat = grad_input.flatten(2)
    empty = argmax < 0
    index = argmax.clamp_min(0).long().flatten(2)
    values = grad_output.masked_fill(empty, 0).flatten(2)
    for image in images.unique().tolist():
        of_image = images == image
        # Both have the shape (C, bins of all regions of the image).
        flat[image].scatter_add_(
            1, index[of_image].transpose(0, 1).flatten(1),
            values[of_image].transpose(0, 1).flatten(1).to(flat.dtype))
    grad_input.copy_(flat.view_as(grad_input))
