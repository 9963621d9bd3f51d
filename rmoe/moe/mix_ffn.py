"""The mixture-of-experts MixFFN, a drop-in for SegFormer's.

Axis letters as in routing.py.
"""
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmoe.moe.layer import MoELayer


class MoEMixFFN(MoELayer):
    """SegFormer's MixFFN (2105.15203) with experts.

    Experts are linear - depthwise convolution - activation - linear. The two
    linear layers are core + residual; the convolution belongs to the core and
    serves all experts. It runs over the map of the tokens' hidden
    activations, each computed by the token's own expert: with zero residuals
    that is the dense map. With K choices there are K maps.

    Args:
        ffn: the MixFFN of mmseg or mmdet; its modules and weights become the
            core and keep their names.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow. It must
            keep every token: a map with holes cannot be convolved.
        core: must be True.
        rank: rank of the residuals.
        align: how gates meet outputs.
        unrouted: what a token gets that no expert kept.
        with_cp: recompute the experts in backward.

    Raises:
        ValueError: without a core, or for a router that drops tokens or
            mixes them.
    """
    layers: nn.Sequential
    core_keys: ClassVar[Mapping[str, str]] = {
        'fc1': 'layers.0', 'fc2': 'layers.4'}
    needs_all_rows: ClassVar[bool] = True

    def __init__(self, ffn: Any, num_experts: int = 8,
                 router: Mapping | None = None, core: bool = True,
                 rank: int | None = None, align: str | None = None,
                 unrouted: str | None = None, with_cp: bool = False) -> None:
        if not core:
            raise ValueError('core=False: the experts of a MixFFN share the '
                             'convolution of its core')
        super().__init__(
            ffn.embed_dims, ffn.feedforward_channels, ffn.layers[2],
            core=dict(layers=ffn.layers), num_experts=num_experts,
            router=router, rank=rank, align=align, unrouted=unrouted,
            dropout=ffn.layers[3].p, fc2_bias=True, with_cp=with_cp)
        self.dropout_layer = ffn.dropout_layer
        check_keeps_every_token(self.router)

    def forward(self, x: Tensor, hw_shape: tuple[int, int],
                identity: Tensor | None = None) -> Tensor:
        """Same signature as MixFFN.

        Args:
            x: (B, h w, D) tokens.
            hw_shape: (h, w).
            identity: (B, h w, D), added to the output; None means ``x``.
        """
        height, width = hw_shape
        if self.core_only:
            image = x.transpose(1, 2).unflatten(2, (height, width))
            out = self.layers(image).flatten(2).transpose(1, 2)
        else:
            out = self.layers[5](self.mixture(
                x, None, partial(convolve_maps, self.layers[1],
                                 (height, width))))
        return (x if identity is None else identity) + self.dropout_layer(out)


def check_keeps_every_token(router: Any) -> None:
    """Raises:
        ValueError: for a router that drops tokens or mixes them.
    """
    for mode in (False, True):
        router.train(mode)
        if router.soft or not router.keeps_every_token:
            raise ValueError(
                f'{type(router).__name__} does not give every token '
                f'its experts in {"training" if mode else "evaluation"}: '
                'a MixFFN convolves the map of their outputs. Use a '
                'token-choice router without capacity')


def convolve_maps(convolve: nn.Module, hw: tuple[int, int], table_TK: Tensor,
                  hidden_NH: Tensor) -> Tensor:
    """The depthwise convolution of each choice's map, as rows again.

    Args:
        convolve: the convolution.
        hw: height and width of a map.
        table_TK: (T, K) the row of each choice of each token.
        hidden_NH: (N, H) rows.
    """
    assert table_TK.numel() == len(hidden_NH)
    maps = []
    for rows_T in table_TK.unbind(1):
        image = hidden_NH[rows_T].unflatten(0, (-1, *hw)).permute(0, 3, 1, 2)
        # Experts run outside autocast, in the type that it gave them.
        same = image.dtype == convolve.weight.dtype
        with nullcontext() if same else torch.autocast(
                image.device.type, image.dtype):
            maps.append(convolve(image).permute(0, 2, 3, 1).flatten(0, 2))
    order_N = torch.cat(table_TK.unbind(1)).argsort()
    return torch.cat(maps)[order_N]
