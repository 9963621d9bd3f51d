"""Attention whose query, key and value are computed by convolutions (CvT,
2103.15808)."""
from collections.abc import Mapping

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.drop import build_dropout
from torch import Tensor, nn
from torch.nn import functional as F


class ConvProjection(nn.Module):
    """A depthwise 3x3 convolution and a batch norm over the map of tokens."""

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
    """Global attention, with keys and values at half the resolution.

    Logits are scaled by embed_dims ** -0.5. This is the scale for the whole
    width and not for one head, because CvT was trained with it.

    Args:
        embed_dims: D.
        num_heads: heads; must divide ``embed_dims``.
        qkv_bias: bias of the linear projections.
        attn_drop_rate: dropout on attention weights.
        proj_drop_rate: dropout on the output.
        dropout_layer: config of the layer on the output (DropPath).
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
        """Compute the attention.

        Args:
            x: (B, h w, D) tokens, or (B, 1 + h w, D) with a class token in
                front, which is left out of the convolutions.
            hw: (h, w).

        Returns:
            The same shape as ``x``.
        """
        batch, tokens, dims = x.shape
        first = tokens - hw[0] * hw[1]
        image = x[:, first:].transpose(1, 2).unflatten(2, hw)
        query, key, value = (self._heads(name, x[:, :first], image)
                             for name in 'qkv')
        # This function need not build the matrix of all pairs of tokens,
        # which at stride 4 of a large image would take gigabytes.
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
