"""Adapters: small files that hold the experts trained on a frozen core."""
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

# Number of values of each dense weight that an adapter file keeps: enough to
# tell one model from another, and too few to make the file large.
SAMPLES = 8
# Relative difference up to which two values count as equal: a model in half
# precision keeps a weight to one part in 256.
TOLERANCE = 1e-2


def save_adapter(model: nn.Module, path: str | os.PathLike,
                 also: Sequence[str] = ()) -> int:
    """Write what the experts add to their dense model to a file.

    The file holds the residuals, the routers, the modules that ``also`` names,
    and the settings from which :func:`load_adapter` makes the layers again.

    Args:
        model: a model that :func:`rmoe.upcycle` changed, without a wrapper.
        path: a .safetensors or .pth file.
        also: names of modules to save whole, such as a new head.

    Returns:
        The number of values in the file.

    Raises:
        ValueError: if :func:`rmoe.upcycle` did not change this model, if
            parameters train that would be left out of the file, or if the
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
    """Give a dense model the experts of an adapter file, in place.

    Args:
        model: the dense model, with the weights that the adapter was trained
            on, and with modules of the shapes that ``also`` named.
        path: a file that :func:`save_adapter` wrote; no code in it is
            executed.

    Returns:
        The report of :func:`rmoe.upcycle`.

    Raises:
        ValueError: if the file is no adapter, or was trained on another
            model, other weights or another head. The model then stays dense.
    """
    content = read_checkpoint(path)
    meta = content.get('meta') or {}
    adapter = meta.get('rmoe_adapter') if isinstance(meta, Mapping) else None
    if adapter is None:
        raise ValueError(f'{path} is no adapter: give a file that '
                         'rmoe.save_adapter wrote')
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
    """Prefixes of the names of all residuals and routers."""
    return tuple(f'{name}.{part}.' for name in moe_layers(model)
                 for part in ('experts', 'router'))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The entries of a state dict. A tensor that has several names comes once,
    under its first name."""
    kept = model.state_dict().keys()
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        if key in kept:
            yield key, value


def _check_whole(model: nn.Module, also: Sequence[str]) -> None:
    """Check that the file will hold everything that changes in training."""
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
            f'{len(lost)} parameters train and would not be in the adapter; '
            f'the first is {lost[0]}. Name their modules in also=(...), or '
            'freeze them before training by '
            "rmoe.set_stage(model, 'residual')")
    moving = [name for name in moving_statistics(model)
              if not is_inside(name, also)]
    if moving:
        raise ValueError(
            f'the statistics of {moving[0]} change in training and would not '
            "be in the adapter. Call rmoe.set_stage(model, 'residual') before "
            'training, which keeps them as they are, or name the module in '
            'also=(...)')


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
                             'which this model does not have. Give the model '
                             'that it was trained on')
        here = torch.tensor(ours[name])
        there = torch.tensor(values)
        close = torch.isclose(here, there, rtol=TOLERANCE, atol=1e-6)
        if not close.all():
            differs = int(close.logical_not().nonzero()[0])
            raise ValueError(
                f'{path} was trained on other weights than the model has: '
                f'a value of {name} is {here[differs]:.6g} in the model and '
                f'was {there[differs]:.6g} in training. Load the dense '
                'checkpoint first, then the adapter')


def _check_shapes(model: nn.Module, state: Mapping[str, Tensor],
                  also: Sequence[str], path: str | os.PathLike) -> None:
    """Check that the modules that the file holds whole have the names and
    shapes of the model's."""
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
                f'has {ours.get(key, "nothing")}: the file is incomplete, or '
                'was made from another model')

