"""A data set whose image files are all packed into one .npz file."""
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from rmoe.classification.transforms import build_transforms, decode
from rmoe.registry import DATASETS

KEYS = ('bytes', 'offsets', 'labels', 'wnids')


@DATASETS.register_module()
class PackedImages(Dataset):
    """Labelled images from a file with the arrays ``bytes`` (uint8, all image
    files end to end), ``offsets`` (N + 1), ``labels`` (N) and ``wnids``
    (names of the classes; a label is an index into them).

    The files stay encoded in memory, in one array that forked worker
    processes share. An image is decoded when it is read.

    Args:
        ann_file: the .npz file, relative to ``data_root``.
        data_root: folder of the data.
        transforms: see :func:`rmoe.classification.transforms.build_transforms`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, lacks an array, or its arrays do
            not fit each other; and, when an image is read, if it cannot be
            decoded.
    """

    def __init__(self, ann_file: str, data_root: str = '',
                 transforms: Sequence[Mapping[str, Any]] = ()) -> None:
        self.path = Path(data_root, ann_file)
        self.transform = build_transforms(transforms)
        arrays = _read(self.path)
        _check(self.path, **arrays)
        self.bytes = arrays['bytes']
        self.offsets = arrays['offsets']
        self.labels = arrays['labels']
        self.metainfo = dict(
            classes=tuple(str(name) for name in arrays['wnids']))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A dict with ``inputs``, an RGB image (3, H, W), and
        ``data_samples``, its label."""
        start, end = self.offsets[index:index + 2]
        image = decode(io.BytesIO(self.bytes[start:end].tobytes()),
                       f'image {index} of {self.path}')
        return dict(inputs=self.transform(image),
                    data_samples=int(self.labels[index]))


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist: set data_root and '
                                'ann_file')
    try:
        with zipfile.ZipFile(path), np.load(path) as file:
            arrays = {key: file[key] for key in KEYS if key in file}
    # NumPy raises a ValueError for pickled objects, which it does not read.
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(f'{path} is damaged or no .npz file: {error}'
                         ) from None
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(f'{path} has no {", ".join(missing)}; it needs the '
                         f'arrays {", ".join(KEYS)}')
    return arrays


def _check(path: Path, bytes: np.ndarray, offsets: np.ndarray,
           labels: np.ndarray, wnids: np.ndarray) -> None:
    if not len(labels):
        raise ValueError(f'{path} holds no image')
    if len(offsets) != len(labels) + 1:
        raise ValueError(f'{path} has {len(labels)} labels and '
                         f'{len(offsets)} offsets; it needs one more offset '
                         'than labels')
    if (np.diff(offsets) < 0).any() or offsets[0] < 0 or (
            offsets[-1] > len(bytes)):
        raise ValueError(f'offsets of {path} run from {offsets[0]} to '
                         f'{offsets[-1]}: they must not decrease, and must lie '
                         f'within its {len(bytes)} bytes')
    wrong = np.flatnonzero((labels < 0) | (labels >= len(wnids)))
    if len(wrong):
        raise ValueError(f'image {wrong[0]} of {path} has the label '
                         f'{labels[wrong[0]]}; there are {len(wnids)} wnids')
