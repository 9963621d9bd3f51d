"""Whole tensors in files, parts of them on each rank."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rmoe import compat
from rmoe.parallel.layout import Layout, layout_of, whole


def accept_full_tensors(model: nn.Module) -> None:
    """Make a model with DTensors load plain tensors of the global shape.

    Every rank cuts its own part of the tensor it was given. It holds for
    torch's and for mmengine's load_state_dict, and for copies of the model.
    Call it after sharding: modules change whole tensors in the order in which
    their hooks came, and upcycling must have seen them whole.

    Args:
        model: its parameters, or some of them, are DTensors.
    """
    for module in model.modules():
        layouts = {name: layout
                   for name, parameter in module._parameters.items()
                   if (layout := layout_of(parameter))}
        if layouts:
            compat.register_load_hook(module, _cutting(layouts))


def _cutting(layouts: dict[str, Layout]) -> Callable[..., None]:
    # A function, not a partial: copies of a module share it, where a deep
    # copy of a mesh would fail. And layouts as they are now: in the middle
    # of a forward pass parameters are whole.
    def hook(module: nn.Module, state_dict: dict[str, Any], prefix: str,
             *_: Any) -> None:
        for name, layout in layouts.items():
            value = state_dict.get(prefix + name)
            # Another shape is left to whoever reports it.
            if (isinstance(value, Tensor) and layout_of(value) is None and
                    value.shape == getattr(module, name).shape):
                state_dict[prefix + name] = layout.cut(value)

    return hook


def accept_full_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer of DTensors load plain state of the global shape.

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
    # The optimizer keeps and changes it, where it may be a view of a file.
    return value.clone()


def numbered_parameters(optimizer: torch.optim.Optimizer
                        ) -> dict[int, Tensor]:
    """Parameters by their number in the optimizer's state dict."""
    return dict(enumerate(
        parameter for group in optimizer.param_groups
        for parameter in group['params']))


def gather(content: Any, keep: bool) -> None:
    """Replace every DTensor by the global tensor on the CPU.

    One at a time, so that a rank has one whole tensor more than it keeps.
    Every rank must call this with the same names in the same order.

    Args:
        content: nested dicts and lists; changed in place.
        keep: False puts None where a DTensor was: on all ranks but the one
            that writes the file.
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
    # torch.save writes all of a view's storage, and sharded parameters are
    # views of padded ones.
    size = tensor.numel() * tensor.element_size()
    return (tensor if tensor.untyped_storage().nbytes() == size
            else tensor.clone())
