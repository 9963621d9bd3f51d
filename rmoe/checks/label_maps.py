"""Counts the labels in the label maps of a segmentation data set."""
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The transforms of these packages do not turn labels into other labels. Those
# of other packages may.
KNOWN_PACKAGES = ('mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg', 'rmoe')


@dataclass
class LabelCount:
    """The labels in some label maps of one data set.

    Attributes:
        maps: number of label maps that were read.
        pixels: number of pixels of each label that LoadAnnotations returns.
        stored: number of pixels of each label in the files, before
            ``reduce_zero_label`` and a choice of classes.
        files: for each label, the first file that has it.
        uniform: for each label, the number of maps that have no other label.
        coloured: (file, shape) of each map that is not a plain (H, W) map.
        reduced: whether the data set has ``reduce_zero_label=True``.
        converters: transforms after LoadAnnotations that may change labels,
            because they are not of one of ``KNOWN_PACKAGES``.
    """
    maps: int = 0
    pixels: Counter[int] = field(default_factory=Counter)
    stored: Counter[int] = field(default_factory=Counter)
    files: dict[int, str] = field(default_factory=dict)
    uniform: Counter[int] = field(default_factory=Counter)
    coloured: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    reduced: bool = False
    converters: tuple[str, ...] = ()

    def add(self, other: 'LabelCount') -> None:
        """Add the counts of ``other`` to these."""
        self.maps += other.maps
        self.pixels.update(other.pixels)
        self.stored.update(other.stored)
        for label, path in other.files.items():
            self.files.setdefault(label, path)
        self.uniform.update(other.uniform)
        self.coloured += other.coloured
        self.reduced |= other.reduced
        self.converters = self.converters or other.converters


def leaf_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets inside of wrappers and concatenations."""
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from leaf_datasets(part)
    elif hasattr(dataset, 'dataset'):
        yield from leaf_datasets(dataset.dataset)
    else:
        yield dataset


def count_labels(dataset: Any, index: int) -> LabelCount:
    """Count the labels of one label map. The count is empty if the pipeline
    loads no label maps."""
    transforms = dataset.pipeline.transforms
    kinds = [type(transform) for transform in transforms]
    place = next((i for i, kind in enumerate(kinds)
                  if kind.__name__ == 'LoadAnnotations'), None)
    if place is None:
        return LabelCount()
    load, info = transforms[place], dataset.get_data_info(index)
    reduced = bool(info.get('reduce_zero_label'))
    chosen = info.get('label_map') is not None
    stored = _as_stored(load, info) if reduced or chosen else None
    label_map = load(info)['gt_seg_map']
    path = info['seg_map_path']
    count = LabelCount(maps=1, reduced=reduced, converters=tuple(
        kind.__name__ for kind in kinds[place + 1:]
        if kind.__module__.split('.')[0] not in KNOWN_PACKAGES))
    if label_map.ndim > 2:
        count.coloured.append((path, label_map.shape))
        return count
    count.pixels.update(_histogram(label_map))
    count.stored.update(count.pixels if stored is None else
                        _histogram(stored))
    count.files = dict.fromkeys(count.pixels, path)
    if len(count.pixels) == 1:
        count.uniform.update(list(count.pixels))
    return count


def _as_stored(load: Any, info: dict[str, Any]) -> np.ndarray:
    # LoadAnnotations keeps the reduce_zero_label of the first map that it
    # loads, so a copy of it is used.
    plain = copy.copy(load)
    plain.reduce_zero_label = False
    return plain(dict(copy.deepcopy(info), reduce_zero_label=False,
                      label_map=None))['gt_seg_map']


def _histogram(label_map: np.ndarray) -> dict[int, int]:
    if label_map.dtype == np.uint8:  # much faster than sorting
        counts = np.bincount(label_map.ravel())
        return {int(label): int(counts[label])
                for label in np.flatnonzero(counts)}
    labels, counts = np.unique(label_map, return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))
