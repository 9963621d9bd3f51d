"""Writes checkpoint files, whole or not at all."""
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

    The file appears whole or not at all. It is written as it is made, so that
    its bytes are never in memory beside the tensors.
    """
    tensors = {key: value.contiguous() for key, value in state_dict.items()}
    if Path(path).suffix == '.safetensors':
        _write(path, lambda file: save_file(
            tensors, file, {'meta': json.dumps(meta)}))
    else:
        _write(path, lambda file: torch.save(
            dict(meta=meta, state_dict=tensors), file))


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write bytes under a temporary name, then rename the file. If the disk is
    full or the process is killed, the file from before is still there."""
    _write(path, lambda file: file.write_bytes(data))


def write_content(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a checkpoint's content as .pth, whole or not at all. It is written
    as it is made, so that its bytes are never in memory beside the tensors."""
    def write(temporary: Path) -> None:
        # torch.save gets an open file, because it would write the name of a
        # path into the file.
        with open(temporary, 'wb') as file:
            torch.save(content, file)

    _write(path, write)


def _write(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        # The file gets the permissions that the user's umask gives a new file.
        # safetensors would make one that other users cannot read.
        temporary.touch()
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(permissions)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
