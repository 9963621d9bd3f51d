"""Fits the weights of a checkpoint, dense or MoE, to a MoE model.

The report has every key of the checkpoint and of the model. A key that has no
place on the other side raises an error.
"""
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rmoe.moe import moe_layers
from rmoe.moe.layer import MoELayer
from rmoe.upcycling import differences, keymaps
from rmoe.upcycling.channels import adapt_channels, image_convolution
from rmoe.upcycling.expert_count import choose_groups, regroup
from rmoe.upcycling.report import Report

EXPERT_PARTS = ('experts.', 'router.')


def fit(model: Any, state: Mapping[str, Tensor],
        expert_mismatch: str = 'raise',
        loads: Mapping[str, Tensor] | None = None
        ) -> tuple[dict[str, Tensor], Report]:
    """Make weights for every key of ``model`` from a checkpoint's state dict.

    Args:
        model: a backbone, with its ``architecture``; its MoE layers may be
            dense in the file.
        state: weights of the backbone alone, named as in any known source.
        expert_mismatch: what to do if the file has another number of experts:
            'raise', or a way of
            :func:`rmoe.upcycling.expert_count.choose_groups`.
        loads: for 'prune', the number of tokens that each expert of the file
            took, by the name of the MoE layer.

    Returns:
        A complete state dict for the model, and the report. Tensors are
        shared with ``state`` and the model where nothing changed.

    Raises:
        ValueError: if the file has another architecture or number of experts,
            if it holds weights that the model has no place for, or if one of
            the two is folded and the other is not. Names the first
            mismatching key and both shapes.
    """
    architecture = model.architecture
    source = architecture.recognise(state)
    # A backbone of another library may be the very model that is refused for
    # our own architectures, so only these are checked.
    if architecture in keymaps.ARCHITECTURES and (
            refusal := keymaps.explain_refusal(state)):
        raise ValueError(refusal)
    if source is None:
        raise ValueError(_what_else(architecture, state))
    if source.verify:
        source.verify(model, state)
    renamed, left_out = keymaps.rename(state, source)
    report = Report(source.name, left_out=left_out)
    target = model.state_dict()
    for name, layer in moe_layers(model).items():
        _convert_layer(name, layer, renamed, target, report, expert_mismatch,
                       (loads or {}).get(name))
    _adapt_image_channels(model, renamed, target, report)
    fitted = {}
    wrong: list[str] = []
    for key, current in target.items():
        try:
            fitted[key], status = _fit_key(model, key, current, renamed)
        except ValueError as error:
            wrong.append(str(error))
        else:
            report.status.setdefault(key, status)
    wrong += _check_leftovers(architecture, renamed, target, report)
    if wrong:
        raise ValueError(differences.message(
            source.name, architecture.name, renamed, target, wrong))
    return fitted, report


def count_experts(model: Any, state: Mapping[str, Tensor]) -> int:
    """Number of experts of a MoE layer in a checkpoint of any source; 0 if the
    checkpoint is dense, or of no source that the model can load."""
    source = model.architecture.recognise(state)
    if source is None:
        return 0
    renamed, _ = keymaps.rename(state, source)
    return next((len(tensor) for key, tensor in renamed.items()
                 if key.endswith('.experts.residual_fc1_bias')), 0)


def _what_else(architecture: keymaps.Architecture,
               state: Mapping[str, Tensor]) -> str:
    for other in keymaps.ARCHITECTURES:
        if other is not architecture and (source := other.recognise(state)):
            return (f'the checkpoint is that of a {source.name}, the model is '
                    f'a {architecture.name}: load a checkpoint of the same '
                    'architecture')
    known = ', '.join(source.name for source in architecture.sources)
    return ('the checkpoint is of no source this backbone can read '
            f'({known}); its first keys are {list(state)[:4]}')


def _convert_layer(name: str, layer: MoELayer, renamed: dict[str, Tensor],
                   target: Mapping[str, Tensor], report: Report,
                   expert_mismatch: str, loads_E: Tensor | None) -> None:
    """Complete the expert and router weights of one layer in ``renamed``."""
    _check_folded(name, layer, renamed)
    if not any(key.startswith(f'{name}.experts.') for key in renamed):
        _upcycle_layer(name, layer, renamed, target, report)
        return
    _check_router(name, layer, renamed, target)
    _match_core(name, layer, renamed, report)
    own_keys = [key for key in target if key in renamed and key.startswith(
        tuple(f'{name}.{part}' for part in EXPERT_PARTS))]
    num_experts = len(renamed[f'{name}.experts.residual_fc1_bias'])
    if num_experts == layer.num_experts:
        return
    if expert_mismatch == 'raise':
        raise ValueError(
            f'{name} has {num_experts} experts in the checkpoint and '
            f'{layer.num_experts} in the model. Set moe.expert_mismatch to '
            "'tile', 'slice' or 'merge', or num_experts="
            f'{num_experts}')
    if expert_mismatch == 'merge' and layer.experts.rank is not None:
        raise ValueError(
            f"{name}: 'merge' needs full-rank residuals, because factors of "
            f"rank {layer.experts.rank} have no mean: use 'slice'")
    weights = [renamed[key].flatten(1) for key in own_keys
               if re.search(r'residual_fc\d_weight$', key)]
    groups = choose_groups(
        expert_mismatch, torch.cat(weights, 1) if weights else
        torch.zeros(num_experts, 0), layer.num_experts, loads_E)
    for key in own_keys:
        # Tensors that are stacked over experts have another shape. Those that
        # a router has for all experts (a temperature, a projection) do not.
        if renamed[key].shape != target[key].shape:
            try:
                renamed[key] = regroup(renamed[key], target[key].shape,
                                       groups, num_experts)
            except ValueError as error:
                raise ValueError(f'{key}: {error}') from None
            report.status[key] = 'converted'


def _check_folded(name: str, layer: MoELayer,
                  renamed: Mapping[str, Tensor]) -> None:
    """Raise if only one of model and file is folded. Folded experts, which
    contain the core, have the names and shapes of residuals; only the key
    'folded' tells them apart."""
    in_file = f'{name}.experts.folded' in renamed
    in_model = layer.experts.folded is not None
    if in_file and not in_model:
        raise ValueError(
            f'{name} was folded for inference before the checkpoint was '
            'saved: its residuals are gone. Load the checkpoint that the '
            'model had before rmoe.upcycling.fold')
    if in_model and not in_file:
        raise ValueError(
            f'{name} of the model is folded for inference and the checkpoint '
            'is not: load the checkpoint into a new model and call '
            'rmoe.upcycling.fold after that')


def _check_router(name: str, layer: MoELayer, renamed: Mapping[str, Tensor],
                  target: Mapping[str, Tensor]) -> None:
    """Check that the router in the file has the same weights as the model's."""
    prefix = f'{name}.router.'
    theirs, ours = ({key.removeprefix(prefix) for key in state
                     if key.startswith(prefix)} for state in (renamed, target))
    if theirs != ours:
        raise ValueError(
            f"{name}: the checkpoint's router has the weights "
            f'{sorted(theirs)}, the {type(layer.router).__name__} of the '
            f'model needs {sorted(ours)}. Set moe.router to the router the '
            'checkpoint was trained with, or make it dense with '
            'tools/upcycle.py --to-dense and upcycle it again')


def _core_pairs(name: str, layer: MoELayer
                ) -> list[tuple[list[str], str]]:
    """(keys of the core, key of the experts) of each weight and bias. Several
    keys of the core are joined along the first axis."""
    return [([f'{place}.{part}' for place in layer.core_names(name, linear)],
             f'{name}.experts.residual_{linear}_{part}')
            for linear in ('fc1', 'fc2') for part in ('weight', 'bias')]


def _match_core(name: str, layer: MoELayer, renamed: dict[str, Tensor],
                report: Report) -> None:
    """If the file has plain experts and the model a core, make their mean the
    core; in the opposite case, add the core to each expert."""
    pairs = [(core, expert) for core, expert in _core_pairs(name, layer)
             if expert in renamed]
    in_file = pairs[0][0][0] in renamed
    if in_file == layer.experts.core:
        return
    for core, expert in pairs:
        whole = renamed[expert]
        if in_file:
            renamed[expert] = whole + torch.cat(
                [renamed.pop(key) for key in core])
        else:
            mean = whole.float().mean(0).to(whole.dtype)
            renamed[expert] = whole - mean
            for key, rows in zip(core, mean.chunk(len(core))):
                renamed[key] = rows
                report.status[key] = 'converted'
        report.status[expert] = 'converted'


def _upcycle_layer(name: str, layer: MoELayer, renamed: dict[str, Tensor],
                   target: Mapping[str, Tensor], report: Report) -> None:
    """Make a dense FFN the core of a layer, or each of its experts if the layer
    has no core."""
    for key, current in target.items():
        if not key.startswith(tuple(f'{name}.{part}'
                                    for part in EXPERT_PARTS)):
            continue
        renamed[key] = current
        report.status[key] = 'new'
        # Zero residuals make the model equal to the dense one. Only one factor
        # of a low-rank residual is zero: if the right one were zero too, the
        # residual would get no gradient.
        if layer.experts.core and '.residual_' in key and (
                not key.endswith('_down')):
            # An expanded scalar has the whole shape and takes no memory, even
            # if this rank keeps only a part of the parameter.
            renamed[key] = torch.zeros(
                (), dtype=current.dtype,
                device=current.device).expand(current.shape)
    for core, expert in _core_pairs(name, layer):
        if not set(core) <= set(renamed):
            continue
        if layer.experts.core:
            report.status.update(dict.fromkeys(core, 'upcycled'))
        else:
            dense = torch.cat([renamed.pop(key) for key in core])
            renamed[expert] = dense.expand(layer.num_experts, *dense.shape)
            report.status[expert] = 'upcycled'


def _adapt_image_channels(model: Any, renamed: dict[str, Tensor],
                          target: Mapping[str, Tensor], report: Report
                          ) -> None:
    """Adapt the first convolution in ``renamed`` to the number of image
    channels that the model takes."""
    key = image_convolution(model)
    if key not in renamed or key not in target:
        return
    theirs, ours = renamed[key].shape, target[key].shape
    if theirs[1:2] == ours[1:2] or (theirs[:1], theirs[2:]) != (
            ours[:1], ours[2:]):
        return
    try:
        renamed[key], report.notes[key] = adapt_channels(
            renamed[key], ours[1])
    except ValueError as error:
        raise ValueError(f'{key}: {error}') from None
    report.status[key] = 'adapted'


def _fit_key(model: Any, key: str, current: Tensor,
             renamed: Mapping[str, Tensor]) -> tuple[Tensor, str]:
    architecture = model.architecture
    if any(re.fullmatch(pattern, key) for pattern in architecture.computed):
        return current, 'loaded'
    if key not in renamed:
        if any(re.fullmatch(pattern, key) for pattern in architecture.new):
            return current, 'new'
        raise ValueError(
            f'{key} {tuple(current.shape)} of the model is not in the '
            'checkpoint')
    tensor = renamed[key]
    if tensor.is_floating_point():
        tensor = tensor.to(current.dtype)
    if tensor.shape == current.shape:
        return tensor, 'loaded'
    for pattern, resize in architecture.resize:
        if re.fullmatch(pattern, key) and (
                resized := resize(tensor, current, model)) is not None:
            return resized, 'resized'
    raise ValueError(
        f'{key} has shape {tuple(tensor.shape)} in the checkpoint and '
        f'{tuple(current.shape)} in the model' + (
            ': the rank differs' if '.residual_' in key else ''))


def _check_leftovers(architecture: keymaps.Architecture,
                     renamed: Mapping[str, Tensor],
                     target: Mapping[str, Tensor], report: Report
                     ) -> list[str]:
    """A sentence for each weight of the file that the model should use and has
    no place for."""
    wrong = []
    for key, tensor in renamed.items():
        if key in target:
            continue
        reason = keymaps.matching(key, architecture.spare)
        if reason:
            report.left_out[key] = reason
            continue
        if key.endswith('.residual_fc2_bias') and not tensor.any():
            # In Tutel's models without this bias it is there, frozen at zero.
            report.left_out[key] = 'all zero, and the model has no such bias'
            continue
        if re.search(r'\.(experts\.residual|router\.)', key):
            raise ValueError(
                f'{key} {tuple(tensor.shape)} of the checkpoint belongs to a '
                'MoE layer where the model is dense: name its block in '
                'moe.layers, or convert the file with tools/upcycle.py '
                '--to-dense')
        wrong.append(
            f'{key} {tuple(tensor.shape)} of the checkpoint has no place in '
            'the model')
    return wrong
