"""Write checkpoint files, whole or not at all."""
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_checkpoint(path: str | os.PathLike,
                     state_dict: Mapping[str, Tensor],
                     meta: dict[str, Any]) -> None:
    """Write weights and plain metadata as .pth or .safetensors.

    The file appears whole or not at all, and is written as it is made: it is
    never in memory a second time.
    """
    tensors = {key: value.contiguous() for key, value in state_dict.items()}
    if Path(path).suffix == '.safetensors':
        _write(path, lambda file: save_file(
            tensors, file, {'meta': json.dumps(meta)}))
    else:
        _write(path, lambda file: torch.save(
            dict(meta=meta, state_dict=tensors), file))


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write to a temporary name, then rename: a full disk or a kill leaves
    what was there before."""
    _write(path, lambda file: file.write_bytes(data))


def write_content(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a checkpoint's content as .pth, whole or not at all, as it is
    made: the bytes are never in memory beside the tensors."""
    def write(temporary: Path) -> None:
        # Given a name, torch.save would write it into the file.
        with open(temporary, 'wb') as file:
            torch.save(content, file)

    _write(path, write)


def _write(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        # What the user's umask gives a new file. safetensors would give one
        # that nobody else can read.
        temporary.touch()
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(permissions)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
