"""Attention inside (shifted) windows of a token map (Swin, 2103.14030)."""
from collections.abc import Mapping

import torch
from mmcv.cnn.bricks.drop import build_dropout
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe import compat


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a relative position bias.

    Args:
        embed_dims: D.
        num_heads: heads; must divide ``embed_dims``.
        window_size: side of a window, in tokens.
        qkv_bias: bias of the query, key and value projection.
        qk_scale: attention scale; None means head_dim ** -0.5.
        attn_drop_rate: dropout on attention weights.
        proj_drop_rate: dropout on the output.
        pretrained_window_size: None for a table of biases, as in Swin V1. A
            window size selects the log-spaced continuous bias of Swin V2
            (2111.09883, 3.3), without its sigmoid, as in Swin-MoE: a small
            MLP computes the biases from coordinates, which are normalised
            for a window of that size.
    """
    relative_position_index: Tensor
    relative_coords_table: Tensor

    def __init__(self, embed_dims: int, num_heads: int, window_size: int,
                 qkv_bias: bool, qk_scale: float | None,
                 attn_drop_rate: float, proj_drop_rate: float,
                 pretrained_window_size: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.relative_position_bias_table = None
        if pretrained_window_size is None:
            self.relative_position_bias_table = nn.Parameter(
                torch.zeros((2 * window_size - 1)**2, num_heads))
        else:
            self.cpb_mlp = nn.Sequential(
                nn.Linear(2, 512), nn.ReLU(inplace=True),
                nn.Linear(512, num_heads, bias=False))
            self.register_buffer(
                'relative_coords_table',
                log_coordinates(window_size, pretrained_window_size),
                persistent=False)
        self.register_buffer('relative_position_index',
                             _relative_position_index(window_size))
        self.qkv = nn.Linear(embed_dims, embed_dims * 3, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def init_table(self) -> None:
        if self.relative_position_bias_table is not None:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the attention inside each window.

        Args:
            x: (windows, tokens, D), the windows image after image.
            mask: (windows of one image, 1, tokens, tokens), added to the
                attention logits; None for none.
        """
        windows, tokens, dims = x.shape
        query, key, value = self.qkv(x).reshape(
            windows, tokens, 3, self.num_heads, dims // self.num_heads
        ).permute(2, 0, 3, 1, 4)
        table = self.relative_position_bias_table
        if table is None:
            table = self.cpb_mlp(self.relative_coords_table)
        bias = table[self.relative_position_index].permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask).repeat(windows // len(mask), 1, 1, 1)
        x = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.to(query.dtype),
            dropout_p=self.attn_drop_rate if self.training else 0.,
            scale=self.scale)
        x = x.transpose(1, 2)
        if compat.is_compiling():
            # The attention of torch.onnx lays out its result in another
            # memory order than PyTorch's, for which the view below was traced
            # (pytorch issue 136543). A contiguous copy avoids that.
            x = x.clone(memory_format=torch.contiguous_format)
        x = x.reshape(windows, tokens, dims)
        return self.proj_drop(self.proj(x))


class ShiftedWindowAttention(nn.Module):
    """Partition a map into (shifted) windows, compute the attention inside
    each, and put the windows together again.

    Args:
        window_size: side of a window, in tokens.
        shift: number of tokens by which windows are shifted; 0 for none.
        dropout_layer: config of the layer on the output (DropPath).
        shift_small_maps: whether windows are also shifted if one of them
            covers a whole side of the map.
        attention: arguments of :class:`WindowAttention`.
    """

    def __init__(self, window_size: int, shift: int, dropout_layer: Mapping,
                 shift_small_maps: bool, attention: Mapping) -> None:
        super().__init__()
        self.shift_small_maps = shift_small_maps
        self.window_size = window_size
        self.shift = shift
        self.w_msa = WindowAttention(window_size=window_size, **attention)
        self.drop = build_dropout(dict(dropout_layer))

    def forward(self, x: Tensor, hw: tuple[int, int],
                mask: Tensor | None) -> Tensor:
        batch, _, dims = x.shape
        height, width = hw
        size, shift = self.window_size, self.shift
        if min(hw) <= size and not self.shift_small_maps:
            shift = 0
        x = x.view(batch, height, width, dims)
        pad_bottom, pad_right = -height % size, -width % size
        if pad_bottom or pad_right:
            x = F.pad(x, (0, 0, 0, pad_right, 0, pad_bottom))
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        rows, columns = x.shape[1] // size, x.shape[2] // size
        x = x.view(batch, rows, size, columns, size, dims).transpose(2, 3)
        x = self.w_msa(
            x.reshape(-1, size * size, dims), mask if shift else None)
        x = x.view(batch, rows, columns, size, size, dims).transpose(2, 3)
        x = x.reshape(batch, rows * size, columns * size, dims)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        if pad_bottom or pad_right:
            x = x[:, :height, :width]
        return self.drop(x.reshape(batch, height * width, dims))


def log_coordinates(size: int, pretrained_size: int) -> Tensor:
    """((2 size - 1)^2, 2), the log-spaced coordinates
    sign(d) log2(1 + 8 |d|) / 3 of all distances d between tokens of a window.

    Args:
        size: side of the window.
        pretrained_size: side of the window in pretraining. Its largest
            distance is the unit of d.
    """
    distance = torch.arange(1. - size, size) * 8 / max(pretrained_size - 1, 1)
    distance = distance.sign() * torch.log2(distance.abs() + 1) / 3
    return torch.cartesian_prod(distance, distance)


def _relative_position_index(size: int) -> Tensor:
    """(size^2, size^2), for each pair of tokens its index in the bias
    table."""
    coords = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    relative = coords[:, None] - coords[None] + size - 1
    return relative[..., 0] * (2 * size - 1) + relative[..., 1]


def shift_mask(hw: tuple[int, int], size: int,
                device: torch.device) -> Tensor:
    """(windows, 1, tokens, tokens), the mask of shifted windows, which is
    added to the attention logits.

    The shift moves tokens from one edge of the map to the opposite one, into
    windows with tokens that are far away. The mask is -100 between such
    tokens, and 0 elsewhere.

    Args:
        hw: height and width of the map, in tokens.
        size: side of a window, in tokens.
        device: device of the result.
    """
    shift = size // 2
    regions = []
    for side in hw:
        padded = side + -side % size
        position = torch.arange(padded, device=device)
        regions.append((position >= padded - size).int() +
                       (position >= padded - shift).int())
    region = regions[0][:, None] * 3 + regions[1]
    windows = region.unflatten(1, (-1, size)).unflatten(
        0, (-1, size)).transpose(1, 2).reshape(-1, size * size)
    apart = windows[:, None, :] != windows[:, :, None]
    return torch.where(apart, -100., 0.)[:, None]
