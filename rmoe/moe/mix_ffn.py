"""MoE layers for FFNs that contain a convolution over the map of tokens:
SegFormer's and PVT's MixFFN, and SegNeXt's Mlp.

Axis letters as in routing.py.
"""
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe.layer import MoELayer
from rmoe.moe.mixing import Middle


class MoEMixFFN(MoELayer):
    """SegFormer's MixFFN (2105.15203) with experts, and PVT's (2102.12122).

    The FFNs of SegFormer and PVT v2 are linear - depthwise convolution -
    activation - linear. With experts, the two linear layers are core +
    residual. The convolution belongs to the core, and all experts share it.
    It runs over the map of the tokens' hidden activations, where each token's
    activation comes from its own expert. With zero residuals that is the map
    of the dense FFN. If each token has K experts, there are K maps. PVT v1 has
    no convolution.

    Args:
        ffn: the MixFFN of mmseg or mmdet; its modules and weights become the
            core and keep their names.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow. With a
            convolution it must keep every token, because a map with missing
            tokens cannot be convolved.
        core: must be True.
        rank: rank of the residuals.
        align: how gates weight the experts' outputs.
        unrouted: what a token gets that no expert kept.
        with_cp: recompute the experts in backward.

    Raises:
        ValueError: without a core, or, with a convolution, for a router
            that drops tokens or mixes them.
    """
    layers: nn.Sequential
    # This holds for PVT v1 too, which has no convolution: its layers take
    # maps, which plain experts do not.
    shares_core = 'convolution'

    def __init__(self, ffn: Any, num_experts: int = 8,
                 router: Mapping | None = None, core: bool = True,
                 rank: int | None = None, align: str | None = None,
                 unrouted: str | None = None, with_cp: bool = False) -> None:
        convolves = len(ffn.layers) == 6
        fc2 = 4 if convolves else 3
        super().__init__(
            ffn.embed_dims, ffn.feedforward_channels, ffn.layers[fc2 - 2],
            core=dict(layers=ffn.layers) if core else None,
            num_experts=num_experts, router=router, rank=rank, align=align,
            unrouted=unrouted, dropout=ffn.layers[fc2 - 1].p, fc2_bias=True,
            with_cp=with_cp)
        self.core_keys = {'fc1': ('layers.0', ), 'fc2': (f'layers.{fc2}', )}
        self.needs_all_rows = convolves
        self.out_drop = nn.Dropout(ffn.layers[-1].p)
        self.dropout_layer = ffn.dropout_layer
        if convolves:
            _check_keeps_every_token(self.router)

    def forward(self, x: Tensor, hw_shape: tuple[int, int],
                identity: Tensor | None = None,
                valid: Tensor | None = None) -> Tensor:
        """Compute the layer with the signature of MixFFN.

        Args:
            x: (B, h w, D) tokens.
            hw_shape: (h, w).
            identity: (B, h w, D), added to the output; None means ``x``.
            valid: as in :class:`rmoe.moe.MoEFFN`; only for layers without a
                convolution.
        """
        if self.core_only:
            image = x.transpose(1, 2).unflatten(2, hw_shape)
            out = self.layers(image).flatten(2).transpose(1, 2)
        else:
            middle = (_middle(self.layers[1], hw_shape)
                      if self.needs_all_rows else None)
            out = self.out_drop(self.mixture(x, valid, middle))
        return (x if identity is None else identity) + self.dropout_layer(out)

    def _dense(self, x: Tensor) -> Tensor:
        # Without a convolution, each token can be passed as a 1x1 map.
        assert not self.needs_all_rows
        rows_ND11 = x.reshape(-1, x.shape[-1], 1, 1)
        return self.layers(rows_ND11).reshape(x.shape)


class ConvolvedMlp(MoELayer):
    """A MLP with a depthwise convolution after its first layer, with experts
    as in :class:`MoEMixFFN`.

    A subclass defines the library's names of the parts, and ``forward`` with
    the library's signature.

    Args:
        mlp: the library's MLP; its modules and weights become the core and
            keep their names.
        num_experts: E.
        router: see :class:`rmoe.moe.MoEFFN`, like all that follow. It must
            keep every token, because a map with missing tokens cannot be
            convolved.
        core: must be True.
        rank: rank of the residuals.
        align: how gates weight the experts' outputs.
        unrouted: what a token gets that no expert kept.
        with_cp: recompute the experts in backward.

    Attributes:
        parts: names of the first layer, the activation, the dropout and the
            second layer.

    Raises:
        ValueError: without a core, or for a router that drops tokens or
            mixes them.
    """
    parts: tuple[str, str, str, str]
    shares_core = 'convolution'
    needs_all_rows = True

    def __init__(self, mlp: nn.Module, num_experts: int = 8,
                 router: Mapping | None = None, core: bool = True,
                 rank: int | None = None, align: str | None = None,
                 unrouted: str | None = None, with_cp: bool = False) -> None:
        fc1, act, drop, fc2 = (getattr(mlp, name) for name in self.parts)
        hidden, dims = fc1.weight.shape[:2]
        super().__init__(
            dims, hidden, act,
            core=dict(mlp.named_children()) if core else None,
            num_experts=num_experts, router=router, rank=rank, align=align,
            unrouted=unrouted, dropout=drop.p, fc2_bias=fc2.bias is not None,
            with_cp=with_cp)
        self.core_keys = {'fc1': self.parts[:1], 'fc2': self.parts[3:]}
        _check_keeps_every_token(self.router)


class MoEConvMlp(ConvolvedMlp):
    """The Mlp of SegNeXt's MSCAN (2209.08575) in mmseg, with experts.

    It takes maps instead of tokens. The identity is added by its block.
    """
    fc1: nn.Module
    dwconv: nn.Module
    act: nn.Module
    drop: nn.Module
    fc2: nn.Module
    parts = ('fc1', 'act', 'drop', 'fc2')

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) maps to (B, D, h, w)."""
        if self.core_only:
            hidden = self.drop(self.act(self.dwconv(self.fc1(x))))
            return self.drop(self.fc2(hidden))
        out = self.mixture(x.flatten(2).transpose(1, 2), None,
                           _middle(self.dwconv, x.shape[2:]))
        return self.drop(out.transpose(1, 2).reshape(x.shape))


class MoESegformerFFN(ConvolvedMlp):
    """The MixFFN of Hugging Face's SegFormer, with experts."""
    dense1: nn.Module
    dwconv: Any
    intermediate_act_fn: nn.Module
    dense2: nn.Module
    dropout: nn.Module
    parts = ('dense1', 'intermediate_act_fn', 'dropout', 'dense2')

    def forward(self, hidden_states: Tensor, height: int, width: int
                ) -> Tensor:
        """(B, h w, D) tokens of a map to (B, h w, D)."""
        if self.core_only:
            hidden = self.dwconv(self.dense1(hidden_states), height, width)
            out = self.dense2(self.dropout(self.intermediate_act_fn(hidden)))
        else:
            out = self.mixture(hidden_states, None, _middle(
                self.dwconv.dwconv, (height, width)))
        return self.dropout(out)


def _check_keeps_every_token(router: Any) -> None:
    """Refuse a router that does not give every token its experts.

    Raises:
        ValueError: for a router that drops tokens or mixes them.
    """
    for mode in (False, True):
        router.train(mode)
        if router.soft or not router.keeps_every_token:
            raise ValueError(
                f'{type(router).__name__} does not give every token '
                f'its experts in {"training" if mode else "evaluation"}, '
                'but this FFN has a convolution over the map of all tokens, '
                'which must have no holes. Use a token-choice router without '
                'capacity')


def _middle(convolution: nn.Module, hw: tuple[int, ...]) -> Middle:
    return partial(_convolve, convolution, hw)


def _convolve(convolution: Callable[[Tensor], Tensor], hw: tuple[int, ...],
              table_TK: Tensor, hidden_NH: Tensor) -> Tensor:
    """Convolve the hidden rows of MoE tokens as maps.

    Args:
        convolution: the depthwise convolution of the core.
        hw: height and width of the map.
        table_TK: (T, K) int64, the rows of each token, best expert first. The
            k-th map consists of the k-th row of each token.
        hidden_NH: (N, H) hidden rows.

    Returns:
        (N, H), the convolved rows, in the order of ``hidden_NH``.
    """
    assert table_TK.numel() == len(hidden_NH)
    maps = []
    weight: Any = convolution.weight  # type: ignore[attr-defined]
    for rows_T in table_TK.unbind(1):
        image = hidden_NH[rows_T].unflatten(0, (-1, *hw)).permute(0, 3, 1, 2)
        # Experts run with autocast switched off, on rows of its type. The
        # convolution's weights may have another, so it is switched on here.
        same = image.dtype == weight.dtype
        with nullcontext() if same else torch.autocast(
                image.device.type, image.dtype):
            maps.append(convolution(image).permute(0, 2, 3, 1).flatten(0, 2))
    order_N = torch.cat(table_TK.unbind(1)).argsort()
    return torch.cat(maps)[order_N]
