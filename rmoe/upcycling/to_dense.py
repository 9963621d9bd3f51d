"""MoE weights into dense ones."""
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rmoe.moe import moe_layers
from rmoe.moe.layer import MoELayer

WAYS = ('core', 'mean', 'best')


def to_dense(model: nn.Module, how: str = 'core',
             loads: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of the dense twin.

    Args:
        model: a backbone or a whole model with MoE layers.
        how: 'core' keeps the core, or the plain mean of experts that have
            none; 'mean' takes the experts' mean by load; 'best' the expert
            that takes the most tokens.
        loads: (E,) tokens each expert took, by the name of the MoE layer;
            for 'mean' and 'best'.

    Raises:
        ValueError: if there is no MoE layer, or a layer took no token.
    """
    if how not in WAYS:
        raise ValueError(f'{how!r} is not one of {WAYS}')
    layers = moe_layers(model)
    if not layers:
        raise ValueError('the model has no MoE layer to make dense')
    state = model.state_dict()
    for name, layer in layers.items():
        for key in [key for key in state if key.startswith(
                (f'{name}.experts.', f'{name}.router.'))]:
            del state[key]
        if how == 'core' and layer.experts.core:
            continue
        share_E = torch.full((layer.num_experts, ), 1 / layer.num_experts)
        if how != 'core':
            share_E = _share(name, (loads or {})[name], how)
        state.update(_blend(name, layer, share_E))
    return state


def _share(name: str, loads_E: Tensor, how: str) -> Tensor:
    """(E,) weights that sum to one."""
    total = loads_E.sum()
    if total <= 0:
        raise ValueError(f'{name}: no expert took a token, so there is no '
                         'load to go by; give more images')
    if how == 'mean':
        return (loads_E / total).float()
    share_E = torch.zeros(len(loads_E))
    share_E[loads_E.argmax()] = 1
    return share_E


@torch.no_grad()
def _blend(place: str, layer: MoELayer, share_E: Tensor
           ) -> dict[str, Tensor]:
    """The weighted mean of core + residual under the core's names."""
    weights: dict[str, Tensor] = {}
    # Folded experts hold their core already.
    core = layer.core if layer.experts.folded is None else None
    for name in ('fc1', 'fc2'):
        keys = layer.core_names(place, name)
        for part, stacked in (
                ('weight', layer.experts.residual_weight(name)),
                ('bias', getattr(layer.experts, f'residual_{name}_bias'))):
            if stacked is None:
                continue
            blended = torch.tensordot(share_E.to(stacked), stacked, 1)
            blocks = blended.chunk(len(keys))
            if core is not None:
                dense = [getattr(linear, part)
                         for linear in getattr(core, name)]
                blocks = tuple(block.reshape(own.shape) + own
                               for block, own in zip(blocks, dense))
            weights.update(zip((f'{key}.{part}' for key in keys), blocks))
    return weights
