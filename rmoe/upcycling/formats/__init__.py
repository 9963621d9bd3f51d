"""File formats: reads any checkpoint into plain tensors without executing code
in it, and writes our own."""
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rmoe.upcycling.formats.flax import is_flax, read_flax
from rmoe.upcycling.formats.hub import download, is_hub
from rmoe.upcycling.formats.pickles import read_pickle
from rmoe.upcycling.formats.refusals import what_folder_it_is
from rmoe.upcycling.formats.tutel import rank_files, read_rank_files
from rmoe.upcycling.formats.weight_sets import (
    WeightSet,
    choose_set,
    state_dict_of,
    without_wrappers,
)
from rmoe.upcycling.formats.writing import (
    write_atomically,
    write_checkpoint,
    write_content,
)

__all__ = ['WeightSet', 'choose_set', 'read_checkpoint', 'state_dict_of',
           'without_wrappers', 'write_atomically', 'write_checkpoint',
           'write_content']


def read_checkpoint(path: str | os.PathLike,
                    map_location: Any = 'cpu',
                    mapped: bool = True) -> dict[str, Any]:
    """Read a checkpoint. No code in it is executed.

    Args:
        path: a .pth or .safetensors file; a .pkl file of arrays as detectron2
            writes it; a Flax checkpoint (.msgpack, .npz or .index); one of
            Tutel's rank files or their common name; or 'timm:NAME' or
            'hf:NAME' to download.
        map_location: as for torch.load.
        mapped: whether the tensors of a .pth file stay in the file until they
            are used (memory mapping). Nothing may then write to the file.

    Returns:
        The file's content. Objects other than tensors and plain values are
        left out with a warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, cut short, a folder or no checkpoint;
            if reading it would execute code; if a file of a set is missing;
            or if a download fails.
    """
    if is_hub(str(path)):
        found = download(str(path))
        return found if isinstance(found, dict) else read_checkpoint(
            found, map_location, mapped)
    path = Path(path).expanduser()
    if is_flax(path):
        return read_flax(path)
    if rank_files(path):
        return read_rank_files(path, map_location)
    if path.is_dir():
        if kind := what_folder_it_is(path):
            raise ValueError(f'checkpoint {path} was not read, it is {kind}')
        raise ValueError(
            f'checkpoint {path} is a folder. If CheckpointHook(sharded=True) '
            'wrote it, python tools/gather_checkpoint.py '
            f'{path} OUT.pth makes one file of it')
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    if path.stat().st_size == 0:
        raise ValueError(f'checkpoint {path} is empty (0 bytes)')
    if path.suffix == '.safetensors':
        return _read_safetensors(path, map_location)
    content = read_pickle(path, map_location, mapped)
    if not isinstance(content, dict):
        raise ValueError(f'checkpoint {path} holds a '
                         f'{type(content).__name__}, not a state dict')
    return content


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
