"""Experts on a frozen core, as a small file of their own."""
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rmoe.anywhere.in_place import (
    UpcycleReport,
    record_of,
    to_dense,
    upcycle,
)
from rmoe.anywhere.stages import checked_modules, expert_role, is_inside
from rmoe.moe import moe_layers
from rmoe.upcycling import read_checkpoint, write_checkpoint

# Of each core: enough to tell it from another, too few to be worth a thought.
SAMPLES = 8
# Half precision keeps a weight to a part in 256.
TOLERANCE = 1e-2


def save_adapter(model: nn.Module, path: str | os.PathLike,
                 also: Sequence[str] = ()) -> int:
    """Write what the experts add to their dense model.

    The file has the residuals, the routers, what ``also`` names, and what
    :func:`load_adapter` needs to make the layers again.

    Args:
        model: that :func:`rmoe.upcycle` changed, not wrapped.
        path: a .safetensors or .pth file.
        also: names of modules to save whole, such as a new head.

    Returns:
        The number of values in it.

    Raises:
        ValueError: if the model was not made by :func:`rmoe.upcycle`, or if
            something trains that would be left out of the file.
    """
    settings = record_of(model).settings
    also = checked_modules(model, also, 'also')
    lost = [name for name, parameter in model.named_parameters()
            if parameter.requires_grad and not expert_role(name)
            and not is_inside(name, also)]
    if lost:
        raise ValueError(
            f'{len(lost)} parameters train and would not be in the adapter, '
            f'{lost[0]} first: name their modules in also=(...), or freeze '
            "them before training by rmoe.set_stage(model, 'residual')")
    state = {key: value.detach().cpu()
             for key, value in model.state_dict().items()
             if _is_expert(key, model) or is_inside(key, also)}
    meta = dict(rmoe_adapter=dict(
        settings=settings, also=list(also), core=_samples(model)))
    write_checkpoint(path, state, meta)
    return sum(value.numel() for value in state.values())


def load_adapter(model: nn.Module, path: str | os.PathLike) -> UpcycleReport:
    """Put an adapter on its dense model, in place.

    Args:
        model: the dense model, with the weights that the adapter was trained
            on, and with modules of the shapes that ``also`` named.
        path: what :func:`save_adapter` wrote; no code in it is run.

    Returns:
        The report of :func:`rmoe.upcycle`.

    Raises:
        ValueError: if the file is no adapter, or is that of another model, of
            other weights or of another head. Where files do not fit, the
            model is dense as before.
    """
    content = read_checkpoint(path)
    meta = content.get('meta') or {}
    adapter = meta.get('rmoe_adapter') if isinstance(meta, Mapping) else None
    if adapter is None:
        raise ValueError(f'{path} is no adapter of rmoe.save_adapter')
    state: dict[str, Tensor] = content['state_dict']
    _check_shapes(model, state, adapter['also'], path)
    report = upcycle(model, **adapter['settings'])
    try:
        _check_core(_samples(model), adapter['core'], path)
        _check_experts(model, state, path)
    except ValueError:
        to_dense(model)
        raise
    model.load_state_dict(state, strict=False)
    return report


def _is_expert(key: str, model: nn.Module) -> bool:
    return key.startswith(tuple(
        f'{name}.{part}.' for name in moe_layers(model)
        for part in ('experts', 'router')))


def _samples(model: nn.Module) -> dict[str, list[float]]:
    """A few weights of each core, by the name of its layer."""
    samples = {}
    for name, layer in moe_layers(model).items():
        assert layer.core is not None
        flat = layer.core.weight('fc1').detach().flatten()
        at = torch.linspace(0, len(flat) - 1, SAMPLES).long()
        samples[name] = flat[at.to(flat.device)].double().tolist()
    return samples


def _check_core(ours: Mapping[str, list[float]],
                theirs: Mapping[str, list[float]],
                path: str | os.PathLike) -> None:
    for name, values in theirs.items():
        here = torch.tensor(ours[name])
        there = torch.tensor(values)
        if not torch.allclose(here, there, rtol=TOLERANCE, atol=1e-6):
            raise ValueError(
                f'{path} was trained on other weights than the model has: '
                f'{name} has {here[0]:.6g}, it was {there[0]:.6g}. Load the '
                'dense checkpoint first, then the adapter')


def _check_shapes(model: nn.Module, state: Mapping[str, Tensor],
                  also: Sequence[str], path: str | os.PathLike) -> None:
    """Whole modules that the file has must have their place."""
    target = model.state_dict()
    ours = {key for key in target if is_inside(key, also)}
    theirs = {key for key in state if is_inside(key, also)}
    for key in sorted(ours | theirs):
        shapes = [tuple(where[key].shape) if key in where else 'nothing'
                  for where in (state, target)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f'{key}: {path} has {shapes[0]}, the model has {shapes[1]}. '
                'Build the model with the head of the adapter')


def _check_experts(model: nn.Module, state: Mapping[str, Tensor],
                   path: str | os.PathLike) -> None:
    ours = {key: tuple(value.shape)
            for key, value in model.state_dict().items()
            if _is_expert(key, model)}
    theirs = {key: tuple(value.shape) for key, value in state.items()
              if expert_role(key)}
    for key in sorted(set(ours) | set(theirs)):
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f'{key}: {path} has {theirs.get(key, "nothing")}, the model '
                f'has {ours.get(key, "nothing")}: the file is not whole, or '
                'the model is another')

