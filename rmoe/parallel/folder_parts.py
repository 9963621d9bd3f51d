"""The part files of a checkpoint folder: safe reading, and a check that all
are there.

torch.distributed.checkpoint writes one file per rank (``__RANK_0.distcp``),
and ``.metadata``, a pickle that says where each part of each tensor lies.
"""
import pickle
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

METADATA = '.metadata'
# The classes that a .metadata file names. None of them executes code that is in
# the file.
KNOWN = {
    'torch.distributed.checkpoint.metadata': {
        'BytesStorageMetadata', 'ChunkStorageMetadata', 'Metadata',
        'MetadataIndex', 'StorageMeta', 'TensorProperties',
        'TensorStorageMetadata', '_MEM_FORMAT_ENCODING'},
    'torch.distributed.checkpoint.filesystem': {'_StorageInfo'},
    'torch': {'Size'},
    'torch.serialization': {'_get_layout'},
    'pathlib': {'Path', 'PosixPath', 'PurePosixPath', 'WindowsPath'},
    'pathlib._local': {'Path', 'PosixPath', 'PurePosixPath', 'WindowsPath'},
}


class _Unpickler(pickle.Unpickler):

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == 'torch' else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if name in KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f'it asks for {module}.{name}, which no checkpoint '
                         'needs')


class PartsReader(FileSystemReader):
    """torch's reader of part files, without executing code in .metadata."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata = read_metadata(folder)

    def read_metadata(self, *_: Any, **__: Any) -> Any:
        return self._metadata


def read_metadata(folder: Path) -> Any:
    """Read torch's Metadata of a folder, which has the shape, the type and the
    places of the parts of each tensor.

    Raises:
        ValueError: if there is no .metadata file, or it cannot be read.
    """
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(f'{folder} is no checkpoint, or one whose saving '
                         f'did not end: it has no {METADATA}. Give another '
                         'checkpoint')
    try:
        with open(path, 'rb') as file:
            return _Unpickler(file).load()
    except Exception as error:
        raise ValueError(f'{path} is corrupt, cut short or no metadata of a '
                         f'checkpoint: {error}') from error


def check_parts(folder: Path, metadata: Any) -> None:
    """Check that every part file is there, in its full length.

    Raises:
        ValueError: if a file is missing or cut short; names the file and the
            rank that wrote it.
    """
    ends: dict[str, int] = defaultdict(int)
    for place in metadata.storage_data.values():
        name = place.relative_path
        ends[name] = max(ends[name], place.offset + place.length)
    for name, end in sorted(ends.items()):
        found = re.fullmatch(r'__(\d+)_\d+\.distcp', name)
        if found is None:
            raise ValueError(f'{folder / METADATA} names {name!r}, which is '
                             'not a file of this folder')
        by = f'which rank {found[1]} wrote'
        remedy = ('Copy it again from where it was written, or start from '
                  'another checkpoint. Ranks on several machines must save '
                  'to a folder that all of them see')
        path = folder / name
        if not path.is_file():
            raise ValueError(f'{path}, {by}, is missing. {remedy}')
        if path.stat().st_size < end:
            raise ValueError(f'{path}, {by}, is cut short: it has '
                             f'{path.stat().st_size} of {end} bytes. {remedy}')
