"""Read and write checkpoint files without executing what is in them."""
import io
import json
import logging
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.logging import print_log
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

# Where the weights of a training checkpoint lie, by who wrote it.
STATE_KEYS = ('state_dict', 'model', 'module')
# Rebuild tensors and containers; nothing here runs code of the file.
REBUILDERS = {
    ('collections', 'OrderedDict'), ('torch', 'Size'), ('torch', 'device'),
    ('torch._utils', '_rebuild_tensor'),
    ('torch._utils', '_rebuild_tensor_v2'),
    ('torch._utils', '_rebuild_parameter'),
}
# What training checkpoints of known projects carry beside tensors. Such
# objects are replaced by an inert placeholder and left out.
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
}


def read_checkpoint(path: str | os.PathLike,
                    map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a .pth or .safetensors file; no code in it is executed.

    Args:
        path: the file.
        map_location: as for torch.load.

    Returns:
        The file's content. Objects other than tensors and plain values are
        left out with a warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, cut short, no checkpoint, or asks
            for code to be run.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    if path.stat().st_size == 0:
        raise ValueError(f'checkpoint {path} is empty (0 bytes)')
    if path.suffix == '.safetensors':
        return _read_safetensors(path, map_location)
    content = _read_pickle(path, map_location)
    if not isinstance(content, dict):
        raise ValueError(f'checkpoint {path} holds a '
                         f'{type(content).__name__}, not a state dict')
    return content


def state_dict_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint's content, without a 'module.' prefix.

    Raises:
        ValueError: if there are no tensors.
    """
    for key in STATE_KEYS:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {
        key.removeprefix('module.'): value
        for key, value in content.items() if isinstance(value, Tensor)
    }
    if not state:
        raise ValueError('the checkpoint holds no weights; its top-level keys '
                         f'are {list(content)[:8]}')
    return state


def write_checkpoint(path: str | os.PathLike, state_dict: dict[str, Tensor],
                     meta: dict[str, Any]) -> None:
    """Write weights and plain metadata as .pth or .safetensors.

    The file appears whole or not at all.
    """
    path = Path(path)
    if path.suffix == '.safetensors':
        tensors = {key: value.contiguous()
                   for key, value in state_dict.items()}
        data = safetensors_bytes(tensors, {'meta': json.dumps(meta)})
    else:
        buffer = io.BytesIO()
        torch.save(dict(meta=meta, state_dict=state_dict), buffer)
        data = buffer.getvalue()
    write_atomically(path, data)


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write to a temporary name, then rename: a full disk or a kill leaves
    what was there before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_safetensors(path: Path, map_location: Any) -> dict[str, Any]:
    try:
        with safe_open(path, framework='pt',
                       device=str(map_location or 'cpu')) as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            meta = json.loads((file.metadata() or {}).get('meta', '{}'))
    except SafetensorError as error:
        raise ValueError(f'checkpoint {path} is corrupt or cut short: '
                         f'{error}') from error
    return dict(state_dict=state, meta=meta)


def _read_pickle(path: Path, map_location: Any) -> Any:
    try:
        return torch.load(path, map_location=map_location)
    except pickle.UnpicklingError:
        # Not plain enough for torch's own safe loader: tensors only.
        return _read_tensors_only(path, map_location)
    except Exception as error:
        # A broken stream can fail in any way inside the unpickler.
        raise _corrupt(path, error) from error


def _read_tensors_only(path: Path, map_location: Any) -> Any:
    loader = SimpleNamespace(
        __name__='rmoe tensors only', Unpickler=_TensorsOnly,
        load=lambda file, **options: _TensorsOnly(file, **options).load())
    try:
        content = torch.load(path, map_location=map_location,
                             pickle_module=loader, weights_only=False)
    except _Refused as error:
        raise ValueError(
            f'checkpoint {path} asks for {error} to be called. It was not '
            'read: only tensors and plain values are. If you trust the file, '
            'save its weights anew, e.g. torch.save({"state_dict": ...})'
        ) from None
    except Exception as error:
        raise _corrupt(path, error) from error
    left_out: list[str] = []
    content = _without_placeholders(content, '', left_out)
    if left_out:
        print_log(
            f'{path}: left out what is no tensor or plain value: '
            f'{", ".join(left_out[:6])}{" ..." if len(left_out) > 6 else ""}',
            'current', logging.WARNING)
    return content


def _corrupt(path: Path, error: Exception) -> ValueError:
    reason = str(error).split('\n')[0] or type(error).__name__
    return ValueError(f'checkpoint {path} is corrupt, cut short or no '
                      f'checkpoint at all: {reason}')


class _Refused(Exception):
    pass


class _LeftOut:
    """Stands for an object that is not rebuilt; accepts whatever pickle does
    to it and does nothing."""

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
        if (module, name) in BYSTANDERS:
            return _LeftOut
        raise _Refused(f'{module}.{name}')


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
