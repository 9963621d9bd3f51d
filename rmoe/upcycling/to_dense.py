"""Conversion of the weights of a MoE model to those of a dense model."""
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rmoe.moe import moe_layers
from rmoe.moe.layer import MoELayer

WAYS = ('core', 'mean', 'best')


def to_dense(model: nn.Module, how: str = 'core',
             loads: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of the same model with dense FFNs.

    Args:
        model: a backbone or a whole model with MoE layers.
        how: 'core' keeps the core or, in a layer without a core, the plain
            mean of the experts; 'mean' takes the mean of the experts, weighted
            by their load; 'best' the expert that takes the most tokens.
        loads: for 'mean' and 'best', the numbers (E,) of tokens that the
            experts took, by the name of the MoE layer.

    Raises:
        ValueError: if there is no MoE layer, or a layer took no token.
    """
    if how not in WAYS:
        raise ValueError(f'how={how!r} is not one of {WAYS}')
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
    """The weights (E,) of the experts in the mean, which sum to one."""
    total = loads_E.sum()
    if total <= 0:
        raise ValueError(f'{name}: no expert took a token, so their loads are '
                         'unknown: give more images')
    if how == 'mean':
        return (loads_E / total).float()
    share_E = torch.zeros(len(loads_E))
    share_E[loads_E.argmax()] = 1
    return share_E


@torch.no_grad()
def _blend(place: str, layer: MoELayer, share_E: Tensor
           ) -> dict[str, Tensor]:
    """The weighted mean of the experts (core + residual), under the names of
    the core."""
    weights: dict[str, Tensor] = {}
    # Folded experts contain the core already.
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
