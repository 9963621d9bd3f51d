"""Reads .pth files without executing code that is in them."""
import logging
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rmoe.upcycling.formats.plain_pickles import (
    is_plain_pickle,
    read_plain_pickle,
)
from rmoe.upcycling.formats.refusals import Refused, what_it_is
from rmoe.upcycling.say import say

# Names that may be called to rebuild tensors and containers. None of them
# executes code that is in the file.
REBUILDERS = {
    ('collections', 'OrderedDict'), ('torch', 'Size'), ('torch', 'device'),
    ('torch._utils', '_rebuild_tensor'),
    ('torch._utils', '_rebuild_tensor_v2'),
    ('torch._utils', '_rebuild_parameter'),
}
# Names of other objects in the training checkpoints of known projects. Such
# objects are replaced by a placeholder that does nothing, and left out.
BYSTANDERS = {
    ('__builtin__', 'getattr'), ('builtins', 'getattr'),
    ('_codecs', 'encode'),
    ('builtins', 'set'), ('__builtin__', 'set'),
    ('argparse', 'Namespace'), ('pathlib', 'PosixPath'),
    ('yacs.config', 'CfgNode'), ('mmengine.config.config', 'ConfigDict'),
    ('mmengine.logging.history_buffer', 'HistoryBuffer'),
    ('numpy', 'ndarray'), ('numpy', 'dtype'),
    ('numpy.core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', '_reconstruct'),
    ('numpy.core.multiarray', 'scalar'),
    ('numpy._core.multiarray', 'scalar'),
    ('typing', 'Any'), ('collections', 'defaultdict'),
    ('builtins', 'dict'), ('builtins', 'list'), ('builtins', 'int'),
}
# Packages of settings, of which any object is left out in the same way.
SETTINGS = ('omegaconf', 'yacs', 'lightning', 'lightning_fabric',
            'pytorch_lightning')


def read_pickle(path: Path, map_location: Any, mapped: bool = True) -> Any:
    """Read the content of a .pth file, or of a plain pickle of arrays.

    Args:
        path: the file.
        map_location: as for torch.load.
        mapped: whether tensors stay in the file until they are used.

    Raises:
        ValueError: if the file is cut short or no checkpoint, or if reading it
            would execute code.
    """
    if kind := what_it_is(path):
        raise ValueError(f'checkpoint {path} was not read, it is {kind}')
    if is_plain_pickle(path):
        return _read_arrays(path, map_location)
    try:
        # weights_only has to be given, because torch before 2.6 executes code
        # in a file by default.
        return _load(path, map_location, mapped, weights_only=True)
    except pickle.UnpicklingError:
        # torch's own safe loader refuses the objects beside the tensors. Ours
        # leaves them out.
        return _read_tensors_only(path, map_location, mapped)
    except Exception as error:
        # A broken file can make the unpickler raise any kind of error.
        raise _corrupt(path, error) from error


def _read_tensors_only(path: Path, map_location: Any, mapped: bool) -> Any:
    loader = SimpleNamespace(
        __name__='rmoe tensors only', Unpickler=_TensorsOnly,
        load=lambda file, **options: _TensorsOnly(file, **options).load())
    try:
        content = _load(path, map_location, mapped, pickle_module=loader,
                        weights_only=False)
    except Refused as error:
        raise _refusal(path, error) from None
    except Exception as error:
        raise _corrupt(path, error) from error
    left_out: list[str] = []
    content = _without_placeholders(content, '', left_out)
    if left_out:
        say(
            f'{path}: left out what is no tensor or plain value: '
            f'{", ".join(left_out[:6])}{" ..." if len(left_out) > 6 else ""}',
            logging.WARNING)
    return content


def _read_arrays(path: Path, map_location: Any) -> Any:
    try:
        return read_plain_pickle(path, map_location)
    except Refused as error:
        raise _refusal(path, error) from None
    except Exception as error:
        raise _corrupt(path, error) from error


def _refusal(path: Path, error: Refused) -> ValueError:
    return ValueError(
        f'checkpoint {path} asks for {error} to be called. It was not read, '
        'because only tensors and plain values are. If you trust the file, '
        'load it yourself and save its weights alone, e.g. '
        'torch.save({"state_dict": ...})')


def _load(path: Path, map_location: Any, mapped: bool, **options: Any
          ) -> Any:
    # Only the zip format can be memory-mapped; torch < 1.6 wrote another one.
    # The path is a string, because torch 2.1 cannot map the file of a Path.
    return torch.load(str(path), map_location=map_location,
                      mmap=mapped and zipfile.is_zipfile(path), **options)


def _corrupt(path: Path, error: Exception) -> ValueError:
    reason = str(error).split('\n')[0] or type(error).__name__
    return ValueError(f'checkpoint {path} is corrupt, cut short or no '
                      f'checkpoint at all: {reason}')


class _LeftOut:
    """Placeholder for an object that is not rebuilt. It accepts every operation
    of pickle on it and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __new__(cls, *args: object, **kwargs: object) -> '_LeftOut':
        return super().__new__(cls)

    def __call__(self, *args: object, **kwargs: object) -> '_LeftOut':
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass


class _TensorsOnly(pickle.Unpickler):

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in REBUILDERS:
            return super().find_class(module, name)
        if module == 'torch' and isinstance(
                getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ('torch', 'torch.storage') and name.endswith('Storage'):
            return super().find_class(module, name)
        if (module, name) in BYSTANDERS or (
                module.split('.')[0] in SETTINGS):
            return _LeftOut
        raise Refused(f'{module}.{name}')


def _without_placeholders(value: Any, path: str, left_out: list[str]) -> Any:
    if isinstance(value, dict):
        kept = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            name = f'{path}.{key}' if path else str(key)
            if _is_placeholder(item) or _is_placeholder(key):
                left_out.append(name)
            else:
                kept[key] = _without_placeholders(item, name, left_out)
        return kept
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(
            _without_placeholders(item, f'{path}[{i}]', left_out)
            for i, item in enumerate(value) if not _is_placeholder(item))
    return value


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, _LeftOut) or value is _LeftOut
