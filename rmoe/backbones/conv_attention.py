"""Attention whose query, key and value pass a convolution (CvT, 2103.15808).
"""
from collections.abc import Mapping

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.drop import build_dropout
from torch import Tensor, nn
from torch.nn import functional as F


class ConvProjection(nn.Module):
    """Depthwise 3x3 convolution and batch norm of a token map."""

    def __init__(self, embed_dims: int, stride: int,
                 bn_cfg: Mapping) -> None:
        super().__init__()
        self.conv = nn.Conv2d(embed_dims, embed_dims, 3, stride, 1,
                              groups=embed_dims, bias=False)
        self.bn = build_norm_layer(dict(bn_cfg), embed_dims)[1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) map to (B, tokens, D)."""
        return self.bn(self.conv(x)).flatten(2).transpose(1, 2)


class ConvAttention(nn.Module):
    """Global attention; keys and values are taken at half the resolution.

    The scale is that of the whole width, embed_dims ** -0.5, and not of one
    head: CvT was trained so.

    Args:
        embed_dims: D.
        num_heads: heads; must divide ``embed_dims``.
        qkv_bias: bias of the linear projections.
        attn_drop_rate: dropout on attention weights.
        proj_drop_rate: dropout on the output.
        dropout_layer: config of the layer after it (DropPath).
        bn_cfg: batch norm of the convolutional projections.
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool,
                 attn_drop_rate: float, proj_drop_rate: float,
                 dropout_layer: Mapping, bn_cfg: Mapping) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = embed_dims**-0.5
        self.attn_drop_rate = attn_drop_rate
        for name, stride in (('q', 1), ('k', 2), ('v', 2)):
            self.add_module(f'conv_proj_{name}',
                            ConvProjection(embed_dims, stride, bn_cfg))
            self.add_module(f'proj_{name}', nn.Linear(
                embed_dims, embed_dims, bias=qkv_bias))
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)
        self.drop = build_dropout(dict(dropout_layer))

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, [1 +] h w, D); a class token in front passes no convolution."""
        batch, tokens, dims = x.shape
        first = tokens - hw[0] * hw[1]
        image = x[:, first:].transpose(1, 2).unflatten(2, hw)
        query, key, value = (self._heads(name, x[:, :first], image)
                             for name in 'qkv')
        # Never as a matrix of all pairs: at stride 4 of a large image that
        # would take gigabytes.
        x = F.scaled_dot_product_attention(
            query, key, value, scale=self.scale,
            dropout_p=self.attn_drop_rate if self.training else 0.)
        x = x.transpose(1, 2).reshape(batch, tokens, dims)
        return self.drop(self.proj_drop(self.proj(x)))

    def _heads(self, name: str, cls: Tensor, image: Tensor) -> Tensor:
        """(B, heads, tokens, head width) of 'q', 'k' or 'v'."""
        tokens = getattr(self, f'conv_proj_{name}')(image)
        if cls.shape[1]:
            tokens = torch.cat([cls, tokens], 1)
        tokens = getattr(self, f'proj_{name}')(tokens)
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
