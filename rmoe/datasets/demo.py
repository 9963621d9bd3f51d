"""The images of the demo: synthetic scenes, or a data set of the user."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from rmoe.datasets.scenes import CLASSES, PALETTE, write_scenes

IGNORE = 255
CROP = 128
# (images, labels) of training and of validation: ADE20K's layout, and the one
# mmseg's converters write.
LAYOUTS = (
    (('images/training', 'annotations/training'),
     ('images/validation', 'annotations/validation')),
    (('img_dir/train', 'ann_dir/train'), ('img_dir/val', 'ann_dir/val')),
)


@dataclass(frozen=True)
class DataSet:
    """A segmentation data set in mmseg's layout.

    Attributes:
        root: the folder of the data set.
        prefixes: the folders of images and labels, for training and for
            validation.
        suffixes: the suffixes of image files and of label files.
        classes: the names of the classes.
        palette: the colours of the classes.
        size: height and width of a training crop.
        val_images: number of validation images that are used.
        whole: whether training uses whole images instead of crops.
    """
    root: Path
    prefixes: tuple[tuple[str, str], tuple[str, str]]
    suffixes: tuple[str, str]
    classes: tuple[str, ...]
    palette: list[list[int]]
    size: tuple[int, int]
    val_images: int
    whole: bool

    def apply(self, cfg: Config) -> None:
        """Point a config at this data set."""
        common = dict(
            data_root=str(self.root), img_suffix=self.suffixes[0],
            seg_map_suffix=self.suffixes[1],
            metainfo=dict(classes=self.classes, palette=self.palette))
        for split, (images, labels) in zip(('train', 'val'), self.prefixes):
            dataset = cfg[f'{split}_dataloader'].dataset
            dataset.update(common, data_prefix=dict(
                img_path=images, seg_map_path=labels))
        cfg.val_dataloader.dataset.indices = self.val_images
        cfg.test_dataloader = cfg.val_dataloader
        cfg.model.decode_head.num_classes = len(self.classes)
        cfg.model.data_preprocessor.size = self.size
        if not self.whole:
            cfg.train_dataloader.dataset.pipeline.insert(
                2, dict(type='RandomCrop', crop_size=self.size))


def make_scenes(root: Path) -> DataSet:
    """Draw synthetic scenes, unless the folder has them already."""
    write_scenes(root, num_train=800, num_val=100, size=CROP)
    return DataSet(root, LAYOUTS[0], ('.png', '.png'), CLASSES, PALETTE,
                   (CROP, CROP), 100, whole=True)


def find_data(root: Path) -> DataSet:
    """Recognise a data set in mmseg's layout.

    Raises:
        FileNotFoundError: if the folder or its images do not exist.
        ValueError: if images and labels do not match, or a label map is not
            an 8-bit single-channel image.
    """
    if not root.is_dir():
        raise FileNotFoundError(f'--data {root} is no folder')
    prefixes = next((layout for layout in LAYOUTS
                     if (root / layout[0][0]).is_dir()), None)
    if prefixes is None:
        known = ' or '.join(layout[0][0] for layout in LAYOUTS)
        raise FileNotFoundError(f'{root} has no data set in mmseg layout: '
                                f'looked for {known}')
    suffixes = _suffixes(root, prefixes[0])
    num_classes = _count_classes(root, prefixes)
    palette = np.random.default_rng(0).integers(
        32, 256, (num_classes, 3)).tolist()
    val_images = min(25, len(list((root / prefixes[1][0]).iterdir())))
    return DataSet(root.resolve(), prefixes, suffixes,
                   tuple(f'class {i}' for i in range(num_classes)), palette,
                   (CROP, CROP), val_images, whole=False)


def _suffixes(root: Path, prefixes: tuple[str, str]) -> tuple[str, str]:
    image = _first_file(root / prefixes[0])
    label = _first_file(root / prefixes[1])
    if image.stem != label.stem and not label.stem.startswith(image.stem):
        raise ValueError(f'images and labels do not match: {image} and '
                         f'{label}')
    return image.suffix, label.name.removeprefix(image.stem)


def _first_file(folder: Path) -> Path:
    files = sorted(file for file in folder.glob('*') if file.is_file()
                   and not file.name.startswith('.'))
    if not files:
        raise FileNotFoundError(f'{folder} has no files')
    return files[0]


def _count_classes(root: Path, prefixes) -> int:
    largest = 0
    for _, labels in prefixes:
        for file in sorted((root / labels).iterdir()):
            label = np.asarray(Image.open(file))
            if label.ndim != 2 or label.dtype != np.uint8:
                raise ValueError(f'{file} is no 8-bit single-channel label '
                                 f'map: {label.dtype} {label.shape}')
            used = label[label != IGNORE]
            largest = max(largest, int(used.max()) if used.size else 0)
    return largest + 1
