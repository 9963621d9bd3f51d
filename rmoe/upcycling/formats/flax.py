"""Reads weights that Flax wrote, without JAX or Flax.

There are three forms: a msgpack file (flax.serialization); a .npz file whose
names are paths (Google's ViT); and the shards of V-MoE, where ``X.index`` says
how large each array is and which of its slices lie in which of the files
``X.data-00000-of-0000N``.
"""
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

INDEX = '.index'
SUFFIXES = ('.msgpack', '.npz', INDEX)
# Numbers of msgpack extension types: those of flax.serialization, then those of
# V-MoE.
NDARRAY, COMPLEX, NUMPY_SCALAR = 1, 2, 3
SLICES, INDEX_LEAF = 6, 8
# Keys that mark a map as a large array in pieces, and as a shard.
CHUNKED = '__msgpack_chunked_array__'
SHARD = '__msgpack_array_chunk_a87ca2__'
# Known versions of the index. The first releases do not name one.
VERSIONS = (None, '20220622')
# Number of bytes that hold the length of binary data, by the marker of msgpack
# before them.
LENGTH_BYTES = {0xc4: 1, 0xc5: 2, 0xc6: 4}
# More bytes than the shape and type take that precede the data of an array.
HEADER_BYTES = 1024
READ_BYTES = 2**20

Slices = tuple[tuple[int | None, int | None], ...]  # (start, stop) per axis
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class IndexLeaf:
    """The entry of an index for one array.

    Attributes:
        shape: shape of the whole array.
        dtype: type of its elements.
        slices: the part of the array that each of its pieces is.
        shards: the number of the shard that each piece lies in.
    """
    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[Slices, ...]
    shards: tuple[int, ...]


def is_flax(path: str | os.PathLike) -> bool:
    """Whether a path is a Flax checkpoint, or the prefix of a sharded one."""
    path = Path(path).expanduser()
    return path.suffix in SUFFIXES or _index_of(path).is_file()


def read_flax(path: str | os.PathLike) -> dict[str, dict[str, Tensor]]:
    """Read a Flax checkpoint into tensors on the CPU.

    Numbers beside the arrays, such as a step, become tensors without axes.
    All arrays are in memory once; only the array that is being read is there
    twice.

    Args:
        path: a .msgpack or .npz file or, for a sharded checkpoint, the .index
            file or the common beginning of the names of its files.

    Returns:
        dict(state_dict=...), in whose keys the names on the way to an array
        are joined by '/'.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if msgpack is needed and not installed.
        ValueError: if a file is missing, cut short or of another kind, or if
            it holds something else than arrays.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        path = _index_of(path)
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    if path.suffix == '.npz':
        state = _read_npz(path)
    elif path.suffix == INDEX:
        state = _read_shards(path)
    else:
        state = _read_msgpack(path)
    if not state:
        raise ValueError(f'checkpoint {path} holds no arrays: give a file '
                         'with the parameters of a model')
    return dict(state_dict=state)


def _index_of(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + INDEX)


def _import_msgpack() -> Any:
    try:
        import msgpack
    except ImportError:
        raise ImportError('Flax checkpoints are read with msgpack, which is '
                          'not installed: pip install msgpack') from None
    return msgpack


@contextmanager
def _decoding(path: Path, kind: str) -> Iterator[None]:
    """Turn any error of a decoder into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        # A broken file can make the decoder raise any kind of error.
        reason = str(error).split('\n')[0] or type(error).__name__
        raise ValueError(
            f'checkpoint {path} is cut short, corrupt or no {kind}: {reason}. '
            'Download it again, or save its parameters alone') from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    with _decoding(path, '.npz file of plain arrays'), np.load(
            path, allow_pickle=False) as file:
        return {name: _from_numpy(name, file[name]) for name in file.files}


def _from_numpy(name: str, array: np.ndarray) -> Tensor:
    # numpy has no bfloat16 and reads such numbers as two bytes of raw data.
    if array.dtype == np.dtype('V2'):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in 'biufc':
        raise ValueError(f'{name!r} of type {array.dtype} is no array of '
                         'numbers')
    return torch.from_numpy(array)


def _read_msgpack(path: Path) -> dict[str, Tensor]:
    kind = 'msgpack file of Flax'
    tree = _unpack_file(path, kind)
    if not isinstance(tree, dict):
        raise ValueError(f'checkpoint {path} is no {kind}: it holds a '
                         f'{type(tree).__name__}, not named arrays')
    return {name: _as_tensor(path, name, leaf)
            for name, leaf in _leaves(tree)}


def _unpack_file(path: Path, kind: str) -> Any:
    msgpack = _import_msgpack()
    # The file is memory-mapped, so that it is not in memory beside its arrays.
    with (_decoding(path, kind), open(path, 'rb') as file,
          mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content):
        return msgpack.unpackb(content, ext_hook=_decode, raw=False,
                               strict_map_key=False)


def _leaves(node: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """Yield (name, leaf) of a tree in the order that JAX uses, in which the
    keys of maps are sorted as strings. None is no leaf."""
    if isinstance(node, dict) and CHUNKED not in node:
        children = {str(key): child for key, child in node.items()}
        for key in sorted(children):
            yield from _leaves(children[key], f'{name}/{key}' if name else key)
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from _leaves(child, f'{name}/{i}' if name else str(i))
    elif node is not None:
        yield name, node


def _as_tensor(path: Path, name: str, leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, (bool, int, float, complex)):
        return torch.tensor(leaf)
    if not isinstance(leaf, dict):
        raise ValueError(
            f'{name!r} of checkpoint {path} is no array but a '
            f'{type(leaf).__name__}. Save the parameters alone')
    with _decoding(path, f'file with all pieces of {name!r}'):
        whole = torch.cat(_in_order(leaf['chunks'])).view(
            _in_order(leaf['shape']))
        leaf.clear()  # frees the pieces, which are a second copy
        return whole


def _in_order(items: Any) -> list[Any]:
    """The items of a tuple, which Flax stores as a map with the keys '0', '1',
    ..."""
    if isinstance(items, Mapping):
        return [items[str(i)] for i in range(len(items))]
    return list(items)


def _decode(kind: int, data: bytes) -> Any:
    """Decode a msgpack extension. Unknown types are kept as they are, and are
    refused later because they are no arrays."""
    msgpack = _import_msgpack()
    if kind in (NDARRAY, NUMPY_SCALAR):
        return _decode_array(data)
    if kind == COMPLEX:
        return complex(*msgpack.unpackb(data))
    if kind == SLICES:
        return _decode_slices(data)
    if kind == INDEX_LEAF:
        return _decode_index_leaf(data)
    return msgpack.ExtType(kind, data)


def _decode_array(data: bytes) -> Tensor:
    """Decode an array, stored as (shape, type, elements) in an extension."""
    header = _import_msgpack().Unpacker()
    header.feed(data[:HEADER_BYTES])
    header.read_array_header()
    shape, dtype = tuple(header.unpack()), _dtype(header.unpack())
    # The elements are copied once, into the tensor that keeps them. They cannot
    # stay where they are, because the memory of a tensor must be aligned.
    start = header.tell() + 1
    start += LENGTH_BYTES.get(data[start - 1], 0)
    array = torch.empty(shape, dtype=dtype)
    if len(data) - start != array.numel() * array.element_size():
        raise ValueError(f'an array of shape {shape} has '
                         f'{len(data) - start} bytes')
    if array.numel():
        array.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(
            data, np.uint8, offset=start)
    return array


def _dtype(name: str | bytes) -> torch.dtype:
    if isinstance(name, bytes):
        name = name.decode()
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'an array of type {name!r} is no tensor')
    return dtype


def _decode_slices(data: bytes) -> Slices:
    unpack = _import_msgpack().unpackb
    # The third number of a slice, the step, is always None or one.
    return tuple(tuple(unpack(ends)[:2]) for ends in unpack(data, raw=True))


def _decode_index_leaf(data: bytes) -> IndexLeaf:
    unpack = _import_msgpack().unpackb
    whole, slices, shards = unpack(data, raw=True)
    shape, dtype, *_ = unpack(whole, raw=True)
    return IndexLeaf(tuple(shape), _dtype(dtype),
                     tuple(map(_decode_slices, slices)), tuple(shards))


def _read_shards(index: Path) -> dict[str, Tensor]:
    leaves, shards = _read_index(index)
    arrays = {name: torch.empty(leaf.shape, dtype=leaf.dtype)
              for name, leaf in leaves.items()}
    missing = {name: _boxes(leaf) for name, leaf in leaves.items()}
    for path in shards:
        with _decoding(path, f'shard of {index.name}'):
            for number, pieces in _unpack_shard(path):
                name = list(leaves)[number]
                for chunks, slices in pieces:
                    box = _box(slices, leaves[name].shape)
                    if box not in missing[name]:
                        raise ValueError(f'{index.name} does not expect the '
                                         f'slice {box} of {name!r} here')
                    missing[name].remove(box)
                    _place(arrays[name], box, chunks)
    for name, boxes in missing.items():
        if boxes:
            raise ValueError(
                f'the slice {min(boxes)} of {name!r} is in none of the shards '
                f'of {index}. Download them again: they are not of one save')
    return arrays


def _read_index(index: Path) -> tuple[dict[str, IndexLeaf], list[Path]]:
    """The entries of an index in the order of their numbers, and the files that
    hold the arrays."""
    kind = 'index of a V-MoE checkpoint (TensorFlow names its files alike)'
    content = _unpack_file(index, kind)
    with _decoding(index, kind):
        if content.get('version') not in VERSIONS:
            raise ValueError(f'its version {content["version"]!r} is unknown')
        leaves = dict(_leaves(content['index']))
        for name, leaf in leaves.items():
            _check_leaf(name, leaf)
        count = int(content['shard_count'])
    prefix = index.name.removesuffix(INDEX)
    numbers = {shard for leaf in leaves.values() for shard in leaf.shards}
    shards = [index.with_name(f'{prefix}.data-{number:05d}-of-{count:05d}')
              for number in sorted(numbers)]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise ValueError(
            f'checkpoint {index} has {len(shards)} shards, of which '
            f'{missing} are not in its folder. Download them to it')
    return leaves, shards


def _check_leaf(name: str, leaf: Any) -> None:
    """Check the entry of one array in an index.

    Raises:
        ValueError: if it is no array, or its slices do not cover the array.
    """
    if not isinstance(leaf, IndexLeaf):
        raise ValueError(f'{name!r} is no array but a {type(leaf).__name__}')
    # The slices come from a mesh of devices, so two of them are equal or do not
    # overlap. Their sizes therefore add up to the whole.
    covered = sum(math.prod(_shape(box)) for box in _boxes(leaf))
    if covered != math.prod(leaf.shape):
        raise ValueError(f'the slices of {name!r} cover {covered} elements, '
                         f'its shape is {leaf.shape}')


def _boxes(leaf: IndexLeaf) -> set[Box]:
    return {_box(slices, leaf.shape) for slices in leaf.slices}


def _box(slices: Slices, shape: tuple[int, ...]) -> Box:
    """The (start, stop) of a piece along each axis of an array."""
    box = tuple((start or 0, size if stop is None else stop)
                for (start, stop), size in zip(slices, shape))
    if len(slices) != len(shape) or any(
            not 0 <= start <= stop <= size
            for (start, stop), size in zip(box, shape)):
        raise ValueError(f'the slice {slices} is not of an array of shape '
                         f'{shape}')
    return box


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _unpack_shard(path: Path) -> Iterator[tuple[int, list]]:
    """Yield (number of an array, its pieces), with one array in memory at a
    time. A piece is (flat arrays to join, slices of the array)."""
    msgpack = _import_msgpack()
    with open(path, 'rb') as file:
        unpacker = msgpack.Unpacker(
            file, ext_hook=_decode, raw=False, read_size=READ_BYTES,
            max_buffer_size=0)  # 0 means the largest that msgpack allows
        for _ in range(unpacker.read_map_header()):
            key, pieces = unpacker.unpack(), unpacker.unpack()
            if key != SHARD:
                yield int(key), pieces


def _place(array: Tensor, box: Box, chunks: list[Tensor]) -> None:
    if any(chunk.dtype != array.dtype for chunk in chunks):
        raise ValueError(f'a piece is {chunks[0].dtype}, its array '
                         f'{array.dtype}')
    # There is no chunk if the array has no elements.
    whole = chunks[0] if len(chunks) == 1 else torch.cat(
        [array.new_empty(0), *chunks])
    array[tuple(slice(*ends) for ends in box)] = whole.view(_shape(box))
