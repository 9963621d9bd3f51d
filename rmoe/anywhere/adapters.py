"""Experts on a frozen core, as a small file of their own."""
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rmoe.anywhere.in_place import (
    UpcycleReport,
    record_of,
    to_dense,
    upcycle,
)
from rmoe.anywhere.stages import (
    checked_modules,
    is_inside,
    moving_statistics,
)
from rmoe.moe import moe_layers
from rmoe.upcycling import read_checkpoint, write_checkpoint

# Of each weight: enough to tell a model from another, too few to weigh.
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
        ValueError: if the model was not made by :func:`rmoe.upcycle`, if
            something trains that would be left out of the file, or if the
            experts are folded.
    """
    settings = record_of(model).settings
    also = checked_modules(model, also, 'also')
    _check_whole(model, also)
    experts = _places(model)
    state = {key: value.detach().cpu() for key, value in _tensors(model)
             if key.startswith(experts) or is_inside(key, also)}
    meta = dict(rmoe_adapter=dict(
        settings=settings, also=list(also), core=_samples(model, also)))
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
        _check_core(_samples(model, adapter['also']), adapter['core'], path)
        _check_experts(model, state, adapter['also'], path)
    except ValueError:
        to_dense(model)
        raise
    model.load_state_dict(state, strict=False)
    return report


def _places(model: nn.Module) -> tuple[str, ...]:
    """What the names of residuals and routers begin with."""
    return tuple(f'{name}.{part}.' for name in moe_layers(model)
                 for part in ('experts', 'router'))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict has; what has several names once, by its first."""
    kept = model.state_dict().keys()
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        if key in kept:
            yield key, value


def _check_whole(model: nn.Module, also: Sequence[str]) -> None:
    """Is everything that changes in training in the file?"""
    for name, layer in moe_layers(model).items():
        if layer.experts.folded is not None:
            raise ValueError(
                f'{name} is folded for inference and has no residuals: save '
                'the adapter before rmoe.upcycling.fold')
    experts = _places(model)
    lost = [name for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.startswith(experts)
            and not is_inside(name, also)]
    if lost:
        raise ValueError(
            f'{len(lost)} parameters train and would not be in the adapter, '
            f'{lost[0]} first: name their modules in also=(...), or freeze '
            "them before training by rmoe.set_stage(model, 'residual')")
    moving = [name for name in moving_statistics(model)
              if not is_inside(name, also)]
    if moving:
        raise ValueError(
            f'the statistics of {moving[0]} change in training and would not '
            "be in the adapter: call rmoe.set_stage(model, 'residual') before "
            'training, which holds them, or name the module in also=(...)')


def _samples(model: nn.Module, also: Sequence[str]) -> dict[str, list[float]]:
    """A few values of each dense weight that the file leaves out, by name."""
    samples, experts = {}, _places(model)
    for name, value in _tensors(model):
        if (value.is_floating_point() and value.numel()
                and not name.startswith(experts)
                and not is_inside(name, also)):
            flat = value.detach().flatten()
            at = torch.linspace(0, len(flat) - 1, SAMPLES).long()
            samples[name] = flat[at.to(flat.device)].double().tolist()
    return samples


def _check_core(ours: Mapping[str, list[float]],
                theirs: Mapping[str, list[float]],
                path: str | os.PathLike) -> None:
    for name, values in theirs.items():
        if name not in ours:
            raise ValueError(f'{path} was trained on a model with {name}, '
                             'which this one has not')
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
    target = dict(_tensors(model))
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
                   also: Sequence[str], path: str | os.PathLike) -> None:
    experts = _places(model)
    ours = {key: tuple(value.shape) for key, value in _tensors(model)
            if key.startswith(experts)}
    theirs = {key: tuple(value.shape) for key, value in state.items()
              if not is_inside(key, also)}
    for key in sorted(set(ours) | set(theirs)):
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f'{key}: {path} has {theirs.get(key, "nothing")}, the model '
                f'has {ours.get(key, "nothing")}: the file is not whole, or '
                'the model is another')

