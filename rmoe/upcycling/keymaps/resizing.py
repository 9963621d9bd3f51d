"""Resizes tables over positions (position embeddings, relative position biases)
to another window or image size."""
import torch
from torch import Tensor
from torch.nn import functional as F


def resize_table(table_LC: Tensor, grid: tuple[int, int],
                 antialias: bool = False) -> Tensor | None:
    """Resize a table (L, channels) over a square of positions to another grid.

    The interpolation is bicubic, as mmseg does it for relative position
    biases.

    Returns:
        (height x width, channels), or None if L is no square number.
    """
    side = round(len(table_LC)**0.5)
    if side * side != len(table_LC):
        return None
    image = table_LC.t().reshape(1, -1, side, side).float()
    image = F.interpolate(image, grid, mode='bicubic', align_corners=False,
                          antialias=antialias)
    return image[0].flatten(1).t().to(table_LC.dtype)


def resize_bias_table(table: Tensor, current: Tensor) -> Tensor | None:
    """Resize a relative position bias (positions, heads) to another window."""
    side = round(len(current)**0.5)
    if table.shape[1] != current.shape[1] or side * side != len(current):
        return None
    return resize_table(table, (side, side))


def resize_position_embedding(table: Tensor, current: Tensor,
                              grid: tuple[int, int], antialias: bool
                              ) -> Tensor | None:
    """Resize a position embedding (1, [1 +] L, D) to another image size. The
    row of a class token is kept.

    timm resizes with antialiasing; mmseg and Hugging Face do not.
    """
    if table.dim() != 3 or table.shape[-1] != current.shape[-1]:
        return None
    extra = current.shape[1] - grid[0] * grid[1]
    resized = resize_table(table[0, extra:], grid, antialias)
    return None if resized is None else torch.cat(
        [table[0, :extra], resized])[None]
