"""Counts how many bytes autograd keeps for backward, and in which modules."""
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class SavedTensors:
    """Counts the bytes that forward passes in a with block keep for backward.

    The results of the forward passes must not be freed before the block ends,
    because tensors that are freed by then do not count. A storage counts
    once, in the place where it is first kept. Parameters and buffers do not
    count. Copies of parameters in another type are counted separately, because
    it depends on the model wrapper whether there are any.

    Args:
        model: the model whose forward passes run in the block.
        places: the modules in it for which bytes are counted separately, by
            name. A tensor counts for the innermost of them, and outside of
            all for ''.

    Attributes:
        bytes: bytes by place, set at the end of the block.
        copies: bytes of copies of parameters in another type, by place.
        shapes: for each place, the shape of the last input of its module.
    """

    def __init__(self, model: nn.Module, places: dict[str, nn.Module]
                 ) -> None:
        self.bytes: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.shapes: dict[str, torch.Size] = {}
        self._places = places
        self._inside = ['']
        self._kept: dict[int, tuple[StorageWeakRef, str, int]] = {}
        self._own = {_key(tensor) for tensor in
                     [*model.parameters(), *model.buffers()]}
        self._casts = _Casts(self._own)

    def __enter__(self) -> 'SavedTensors':
        self._stack = ExitStack()
        self._stack.enter_context(saved_tensors_hooks(self._keep,
                                                      lambda kept: kept))
        self._stack.enter_context(self._casts)
        for name, module in self._places.items():
            self._stack.enter_context(self._around(name, module))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        for key, (storage, place, count) in self._kept.items():
            if not storage.expired():
                counter = (self.copies if key in self._casts.found else
                           self.bytes)
                counter[place] += count
        self._kept.clear()
        self._casts.found.clear()

    @contextmanager
    def _around(self, name: str, module: nn.Module) -> Iterator[None]:
        def enter(module: nn.Module, args: tuple) -> None:
            self.shapes[name] = args[0].shape
            self._inside.append(name)

        handles = (module.register_forward_pre_hook(enter),
                   module.register_forward_hook(self._leave))
        yield
        for handle in handles:
            handle.remove()

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _keep(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in self._own and key not in self._kept:
            storage = tensor.untyped_storage()
            self._kept[key] = (StorageWeakRef(storage), self._inside[-1],
                               storage.nbytes())
        return tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Casts(TorchDispatchMode):
    """Records the storages of copies of parameters in another type.

    Attributes:
        found: references to these storages by their address. No other storage
            gets the same address while there is a reference.
    """

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own = own
        self.found: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (
                _key(args[0]) in self.own):
            self.found[_key(out)] = StorageWeakRef(out.untyped_storage())
        return out
