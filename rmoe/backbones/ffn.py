"""Decides which blocks of our backbones get a dense FFN and which a MoE FFN,
and builds both."""
from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn.bricks.transformer import FFN
from torch import nn

from rmoe.moe import MoEFFN
from rmoe.moe.ffn import LayerScale

# Keys of a backbone's ``moe`` that are not arguments of a MoE layer.
PLACEMENT_KEYS = ('layers', 'expert_mismatch')


def layer_args(moe: Mapping | None) -> dict[str, Any]:
    """Return the part of a backbone's ``moe`` that holds arguments of its MoE
    layers."""
    return {key: value for key, value in (moe or {}).items()
            if key not in PLACEMENT_KEYS}


class FFNPlan:
    """The plan of a backbone's FFNs: which are MoE, and how to build them.

    Args:
        depths: blocks per stage.
        moe: None or empty for a dense backbone. Otherwise ``layers`` (one
            sequence of block indices per stage), and any arguments of
            :class:`rmoe.moe.MoEFFN` except those that the backbone sets
            itself.
        with_cp: activation checkpointing of the experts.

    Raises:
        ValueError: if ``layers`` is missing, selects no block, or names one
            that does not exist.
    """

    def __init__(self, depths: Sequence[int], moe: Mapping | None,
                 with_cp: bool = False) -> None:
        self.with_cp = with_cp
        self.moe_args = layer_args(moe)
        self.layers = _check_layers(depths, moe['layers']
                                    if moe and 'layers' in moe else None,
                                    bool(moe))

    def build(self, stage: int, block: int, embed_dims: int,
              feedforward_channels: int, act_cfg: Mapping,
              ffn_drop: float, dropout_layer: Mapping,
              fc2_bias: bool = True,
              layer_scale_init_value: float = 0.) -> nn.Module:
        """Build the FFN of one block, dense or MoE. The block calls both kinds
        in the same way."""
        if block in self.layers[stage]:
            layer = MoEFFN(
                embed_dims, feedforward_channels, act_cfg=act_cfg,
                ffn_drop=ffn_drop, dropout_layer=dropout_layer,
                fc2_bias=fc2_bias, with_cp=self.with_cp,
                layer_scale_init_value=layer_scale_init_value,
                **self.moe_args)
            layer.name = f'MoE layer of stage {stage}, block {block}'
            return layer
        ffn = FFN(
            embed_dims, feedforward_channels, num_fcs=2,
            act_cfg=dict(act_cfg), ffn_drop=ffn_drop,
            dropout_layer=dict(dropout_layer), add_identity=True)
        if not fc2_bias:
            ffn.layers[1] = nn.Linear(feedforward_channels, embed_dims,
                                      bias=False)
        if layer_scale_init_value:
            ffn.gamma2 = LayerScale(embed_dims, layer_scale_init_value)
        return ffn


def _check_layers(depths: Sequence[int],
                  layers: Sequence[Sequence[int]] | None,
                  wanted: bool) -> list[frozenset[int]]:
    if not wanted:
        return [frozenset()] * len(depths)
    if layers is None:
        raise ValueError('moe needs layers: one tuple of block indices per '
                         'stage, e.g. layers=((), (), (1, 3, 5), (1,))')
    if len(layers) != len(depths):
        raise ValueError(f'moe.layers={layers} has {len(layers)} entries, '
                         f'the backbone has {len(depths)} stages')
    for stage, (blocks, depth) in enumerate(zip(layers, depths)):
        for block in blocks:
            if not 0 <= block < depth:
                raise ValueError(
                    f'moe.layers[{stage}] names block {block}; stage {stage} '
                    f'has blocks 0 to {depth - 1}')
    if not any(layers):
        raise ValueError(f'moe is given but moe.layers={layers} selects no '
                         'block: no MoE layer would be built. Name blocks, '
                         'or set moe=None for a dense backbone')
    return [frozenset(blocks) for blocks in layers]
