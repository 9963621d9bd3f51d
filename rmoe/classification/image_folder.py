"""A data set of images in one folder per class, as ImageNet is unpacked."""
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from rmoe.classification.transforms import build_transforms, decode
from rmoe.registry import DATASETS


@DATASETS.register_module()
class ImageFolder(Dataset):
    """Labelled images as ``data_root/<img_path>/<class>/*.JPEG``.

    The labels 0, 1, ... number the folders of classes in alphabetical order.

    Args:
        data_root: folder of the data.
        data_prefix: ``dict(img_path=...)``, the folder of the split in
            ``data_root``.
        transforms: see :func:`rmoe.classification.transforms.build_transforms`.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no folders of classes, or a class has no image;
            and, when an image is read, if it cannot be decoded.
    """

    def __init__(self, data_root: str, data_prefix: Mapping[str, str],
                 transforms: Sequence[Mapping[str, Any]] = ()) -> None:
        # Imported here, because segmentors and detectors need no torchvision.
        from torchvision import datasets
        self.root = Path(data_root, data_prefix.get('img_path', ''))
        self.transform = build_transforms(transforms)
        if not self.root.is_dir():
            raise FileNotFoundError(f'{self.root} is no folder: set data_root '
                                    'and data_prefix.img_path')
        try:
            folder = datasets.ImageFolder(self.root)
        except FileNotFoundError as error:
            raise ValueError(
                f'{self.root} must hold one folder of images per class: '
                f'{error}') from None
        # These are arrays, because workers would in time get a copy of a list
        # of paths: reading an element changes its reference count, and with it
        # the memory that processes share.
        self.paths = np.array([os.fsencode(path)
                               for path, _ in folder.samples])
        self.labels = np.array(folder.targets)
        self.metainfo = dict(classes=tuple(folder.classes))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A dict with ``inputs``, an RGB image (3, H, W), and
        ``data_samples``, its label."""
        path = os.fsdecode(self.paths[index])
        return dict(inputs=self.transform(decode(Path(path), path)),
                    data_samples=int(self.labels[index]))
