"""Conversion of state dicts between whole tensors, which files hold, and
DTensors, of which each rank has a part."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rmoe import compat
from rmoe.parallel.layout import Layout, layout_of, whole


def accept_full_tensors(model: nn.Module) -> None:
    """Make a model with DTensors load plain tensors of the global shape.

    Every rank cuts its own part out of a whole tensor. This works with
    torch's and with mmengine's load_state_dict, and for copies of the model.
    Call it after sharding: the load hooks of a module run in the order in
    which they were registered, and the hook that upcycles needs whole tensors.

    Args:
        model: a model of whose parameters some or all are DTensors.
    """
    for module in model.modules():
        layouts = {name: layout
                   for name, parameter in module._parameters.items()
                   if (layout := layout_of(parameter))}
        if layouts:
            compat.register_load_hook(module, _cutting(layouts))


def _cutting(layouts: dict[str, Layout]) -> Callable[..., None]:
    # The hook is a function and not a partial, because copies of a module share
    # a function, but would copy a partial with the mesh in it, which fails. It
    # keeps the layouts of now, because in the middle of a forward pass the
    # parameters are whole.
    def hook(module: nn.Module, state_dict: dict[str, Any], prefix: str,
             *_: Any) -> None:
        for name, layout in layouts.items():
            value = state_dict.get(prefix + name)
            # A tensor of another shape stays as it is, and load_state_dict
            # reports it.
            if (isinstance(value, Tensor) and layout_of(value) is None and
                    value.shape == getattr(module, name).shape):
                state_dict[prefix + name] = layout.cut(value)

    return hook


def accept_full_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer of DTensors load plain tensors of the global shape.

    Args:
        optimizer: torch's, not mmengine's wrapper.
    """
    optimizer.register_load_state_dict_pre_hook(_cut_state)


def _cut_state(optimizer: torch.optim.Optimizer, content: dict[str, Any]
               ) -> dict[str, Any]:
    parameters = numbered_parameters(optimizer)
    state = {
        index: {key: _fit_state(value, parameters.get(index))
                for key, value in values.items()}
        for index, values in content['state'].items()}
    return dict(content, state=state)


def _fit_state(value: Any, parameter: Tensor | None) -> Any:
    if not isinstance(value, Tensor) or layout_of(value):
        return value
    layout = layout_of(parameter)
    if layout and parameter is not None and value.shape == parameter.shape:
        return layout.cut(value)
    # The optimizer keeps the value and changes it in place, but it may be a
    # view of a file.
    return value.clone()


def numbered_parameters(optimizer: torch.optim.Optimizer
                        ) -> dict[int, Tensor]:
    """The parameters, by their numbers in the optimizer's state dict."""
    return dict(enumerate(
        parameter for group in optimizer.param_groups
        for parameter in group['params']))


def gather(content: Any, keep: bool) -> None:
    """Replace every DTensor by the global tensor on the CPU.

    DTensors are gathered one at a time, so that a rank has at most one whole
    tensor more than it keeps. Every rank must call this with the same names
    in the same order.

    Args:
        content: nested dicts and lists; changed in place.
        keep: whether this rank keeps the whole tensors; False puts None in
            their places. Only the rank that writes the file needs them.
    """
    for container, key, _ in tensors_in(content):
        if layout_of(container[key]):
            full = whole(container[key])
            container[key] = _compact(full.cpu()) if keep else None


def tensors_in(content: Any, path: tuple[Any, ...] = ()
               ) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """(container, key, path from the top) of every tensor in nested dicts
    and lists."""
    items = (list(content.items()) if isinstance(content, dict) else
             list(enumerate(content)) if isinstance(content, list) else ())
    for key, value in items:
        if isinstance(value, Tensor):
            yield content, key, (*path, key)
        else:
            yield from tensors_in(value, (*path, key))


def _compact(tensor: Tensor) -> Tensor:
    # torch.save writes the whole storage of a view, and sharded parameters are
    # views of padded tensors.
    size = tensor.numel() * tensor.element_size()
    return (tensor if tensor.untyped_storage().nbytes() == size
            else tensor.clone())
