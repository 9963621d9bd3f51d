"""Folding: core and residuals are added up to whole experts, for inference.

Axis letters as in routing.py; O and I are the output and input width of a
linear layer.
"""
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe import MoELayer, moe_layers

LINEARS = ('fc1', 'fc2')


def fold(model: nn.Module) -> None:
    """Replace every residual by the whole expert (core + residual), in place.
    Outputs stay the same up to rounding.

    Without folding, a MoE layer adds core and residual for each expert in each
    forward pass. A folded model is for inference:

    - It raises a ValueError if it runs in training mode, and its experts
      take no gradient.
    - Its state dict is marked as folded and loads only into a model that is
      folded in the same way; :func:`rmoe.upcycling.fit`, which every load of a
      backbone goes through, refuses it anywhere else. So keep the original
      checkpoint, or write another one with :func:`to_plain`.
    - Load first, then fold: a folded model takes no checkpoint that is not
      folded.

    The core stays in the model, because these need it: tokens that no expert
    kept, padded tokens, ``align='difference'``, the convolution of a MixFFN,
    and ``core_only``. So full-rank experts take as much memory as before.
    Those of a low rank become (E, O, I), as large as experts with
    ``rank=None``. While a layer is being folded, it is in memory twice.

    Call it before ``torch.compile``, export, or anything that keeps
    references to parameters. Layers with ``core=False`` or folded ones stay
    as they are.

    Args:
        model: a backbone or a whole model with MoE layers.

    Raises:
        ValueError: if there is no MoE layer.
    """
    for layer in _moe_layers(model).values():
        if _is_whole(layer):
            continue
        experts = layer.experts
        folded = _whole_experts(layer)
        for name in [name for name, _ in experts.named_parameters(
                recurse=False)]:
            delattr(experts, name)
        for name, value in folded.items():
            experts.register_parameter(
                name, nn.Parameter(value, requires_grad=False))
        experts.rank = None
        experts.folded = torch.ones(
            (), dtype=torch.bool, device=folded['residual_fc1_weight'].device)
        layer.register_forward_pre_hook(_refuse_training)


def to_plain(model: nn.Module) -> dict[str, Tensor]:
    """Make the state dict of the same model with plain experts
    (``core=False``).

    It is for a model with ``core=False``, ``rank=None`` and
    ``unrouted='zero'``. That model computes the same in evaluation, except for
    padded tokens where ``unrouted='core'``: they get zero instead of the
    output of the core.

    Args:
        model: a backbone or a whole model with MoE layers.

    Returns:
        The state dict. It shares all tensors with the model except experts.

    Raises:
        ValueError: if there is no MoE layer, or if one needs its core in
            evaluation.
    """
    layers = _moe_layers(model)
    for name, layer in layers.items():
        if layer.core is not None and (reason := _needs_core(layer)):
            raise ValueError(
                f'{name} needs its core in evaluation: {reason}. Load the '
                'checkpoint as it is and call rmoe.upcycling.fold(model), '
                'which keeps the core beside the folded experts')
    state = model.state_dict()
    for name, layer in layers.items():
        if layer.core is None:
            continue
        own = tuple(f'{name}.experts.{key}' for key in ('residual_', 'folded'))
        own += tuple(f'{key}.' for linear in LINEARS
                     for key in layer.core_names(name, linear))
        for key in [key for key in state if key.startswith(own)]:
            del state[key]
        for key, value in _whole_experts(layer).items():
            state[f'{name}.experts.{key}'] = value
    return state


def _moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    layers = moe_layers(model)
    if not layers:
        raise ValueError('the model has no MoE layer to fold')
    return layers


def _is_whole(layer: MoELayer) -> bool:
    return layer.core is None or layer.experts.folded is not None


@torch.no_grad()
def _whole_experts(layer: MoELayer) -> dict[str, Tensor]:
    """Weights (E, O, I) and biases (E, O) under the names of plain experts."""
    whole = {}
    dtype = next(layer.experts.parameters()).dtype
    for linear in LINEARS:
        weight_EOI = layer.experts.weight(linear, layer.core, dtype)
        bias_EO = layer.experts.bias(linear, layer.core)
        whole[f'residual_{linear}_weight'] = weight_EOI
        if bias_EO is not None:
            whole[f'residual_{linear}_bias'] = bias_EO
    return whole


def _needs_core(layer: MoELayer) -> str:
    """The reason why a layer needs its core in evaluation; empty if it does
    not."""
    if layer.shares_core:
        return f'its experts share the {layer.shares_core} of its core'
    if layer.router.soft:
        return ("align='difference' applies the core to tokens and slots"
                if layer.align == 'difference' else '')
    training = layer.router.training
    layer.router.eval()
    keeps = layer.router.keeps_every_token
    layer.router.train(training)
    if layer.unrouted == 'core' and not keeps:
        return (f'{type(layer.router).__name__} leaves out tokens, which get '
                "the core (unrouted='core')")
    return ''


def _refuse_training(layer: nn.Module, args: Any) -> None:
    if layer.training:
        raise ValueError(
            f'{layer.name or "a MoE layer"} is folded for inference and was '
            'called in training mode: call model.eval(), or train the model '
            'that its checkpoint gives before rmoe.upcycling.fold')
