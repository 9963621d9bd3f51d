"""Reads pickles of arrays, as detectron2 writes them, without executing them.

detectron2's model zoo has plain pickles of numpy arrays, and its converters
for weights of other projects write plain pickles of torch tensors.
``torch.load`` reads neither. Here each name in such a file is replaced by one
of the classes below, which only collect data, or by a function that rebuilds
tensors. numpy's own functions are never called.
"""
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmoe.upcycling.formats.refusals import Refused

# The first byte of pickles of protocol 2 and later. In a file of torch < 1.6 it
# is followed by the number by which torch.load recognises it.
PROTOCOL = b'\x80'
TORCH_MAGIC = b'\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.'
# The types of numbers that a tensor can hold, by numpy's names.
NUMBERS = {'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'b1'}


def is_plain_pickle(path: Path) -> bool:
    """Whether a file is a pickle that torch did not write."""
    with open(path, 'rb') as file:
        head = file.read(2 + len(TORCH_MAGIC))
    return head[:1] == PROTOCOL and head[2:] != TORCH_MAGIC


def read_plain_pickle(path: Path, map_location: Any) -> Any:
    """Read the content of a pickle, with tensors in the place of arrays.

    Args:
        path: the file.
        map_location: as for torch.load.

    Returns:
        The pickled content. Arrays of anything but numbers, and numpy's
        scalars, are None.

    Raises:
        Refused: if the file names anything but arrays and plain containers.
        pickle.UnpicklingError: or another error, if the file is cut short.
    """
    with open(path, 'rb') as file:
        # Python 2 wrote the bytes of arrays as text, which this decodes.
        content = _Arrays(file, encoding='latin1').load()
    return _to_tensors(content, map_location)


class _Arrays(pickle.Unpickler):

    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module.replace('numpy._core.', 'numpy.core.'),
                            name))
        if found is None:
            raise Refused(f'{module}.{name}')
        if isinstance(found, tuple):
            return super().find_class(*found)
        return found


class _Kind:
    """Replaces numpy.dtype: holds the name of a type and its byte order."""

    def __init__(self, name: Any = '', *flags: object) -> None:
        self.name = name if name in NUMBERS else None
        self.order = '<'

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ('<', '>') else '|'

    def of_bytes(self, data: Any, shape: Any, order: str) -> np.ndarray | None:
        if self.name is None:
            return None
        if isinstance(data, str):
            data = data.encode('latin1')
        array = np.frombuffer(data, np.dtype(f'{self.order}{self.name}'))
        return array.reshape(shape, order='F' if order == 'F' else 'C')


class _Array:
    """Replaces numpy.ndarray, whose content pickle sets as a state."""
    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if isinstance(kind, _Kind):
            self.array = kind.of_bytes(data, shape, 'F' if fortran else 'C')


def _new_array(*args: object) -> _Array:
    return _Array()


def _array_of_buffer(data: Any, kind: Any, shape: Any, order: str) -> _Array:
    result = _Array()
    result.array = kind.of_bytes(data, shape, order)
    return result


def _scalar(*args: object) -> None:
    return None


def _encode(text: str, encoding: str = 'latin1') -> bytes:
    """Replaces _codecs.encode, by which older protocols store bytes. Other
    codecs are refused, because Python would import them."""
    if encoding != 'latin1':
        raise Refused(f'the codec {encoding!r}')
    return text.encode('latin1')


def _storage(data: bytes) -> Any:
    """Read the storage that a plain pickle holds with each tensor."""
    return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)


# For each name in a file: our replacement, or the name of a class or function
# that may be called as it is.
_NAMES: dict[tuple[str, str], Any] = {
    ('numpy', 'ndarray'): _Array, ('numpy', 'dtype'): _Kind,
    ('numpy.core.multiarray', '_reconstruct'): _new_array,
    ('numpy.core.multiarray', 'scalar'): _scalar,
    ('numpy.core.numeric', '_frombuffer'): _array_of_buffer,
    ('_codecs', 'encode'): _encode,
    ('torch.storage', '_load_from_bytes'): _storage,
    **{name: name for name in (
        ('collections', 'OrderedDict'), ('torch', 'Size'),
        ('torch._utils', '_rebuild_tensor_v2'),
        ('torch._utils', '_rebuild_parameter'))},
}


def _to_tensors(value: Any, map_location: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_tensors(item, map_location)
                for key, item in value.items()}
    if isinstance(value, list):
        return [_to_tensors(item, map_location) for item in value]
    if isinstance(value, _Array):
        if value.array is None:
            return None
        # A writable copy in the byte order of this machine.
        native = value.array.astype(value.array.dtype.newbyteorder('='))
        value = torch.from_numpy(native)
    if isinstance(value, torch.Tensor) and isinstance(
            map_location, (str, torch.device)):
        return value.to(map_location)
    return value
