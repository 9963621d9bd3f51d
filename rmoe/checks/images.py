"""Finds image files and label maps that are missing, cannot be decoded, or have
another size than they should."""
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mmcv
from PIL import Image, UnidentifiedImageError

from rmoe.checks.findings import Findings

# The EXIF tag for the orientation. From value 5 on, width and height of the
# image are swapped.
ORIENTATION = 0x0112


def is_local(path: str | Path) -> bool:
    """Whether a path is on a local disk, and not an address such as
    's3://...' that a storage backend reads."""
    return ':/' not in str(path)


def evenly_spaced(count: int, most: int | None) -> range:
    """Indices of at most ``most`` of ``count`` items, evenly spaced; of all
    items if ``most`` is None."""
    return range(0, count, max(-(-count // most) if most else 1, 1))


def missing_files(paths: Iterable[str]) -> list[str]:
    """The files that do not exist. Each folder is listed once, which is faster
    than looking for each file."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    missing = []
    for folder, files in folders.items():
        there = set(os.listdir(folder or '.')) if os.path.isdir(
            folder or '.') else set()
        missing += [path for path in files
                    if os.path.basename(path) not in there]
    return missing


def image_size(path: str, upright: bool = True) -> tuple[int, int]:
    """Decode a file completely.

    Args:
        path: the file.
        upright: whether to turn the image as its EXIF data say, which mmcv
            does when it loads images.

    Returns:
        Its width and height.

    Raises:
        ValueError: if it cannot be decoded; names the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            turned = upright and image.getexif().get(ORIENTATION, 1) >= 5
            width, height = image.size
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        # OpenCV reads some formats that Pillow does not know, and images that
        # are too large for Pillow.
        if not os.path.getsize(path):
            raise ValueError(f'{path} is empty (0 bytes)') from None
        array = mmcv.imread(path, flag='unchanged', backend='cv2')
        if array is None:
            raise ValueError(f'{path} does not decode: {error}') from None
        return array.shape[1], array.shape[0]
    # Pillow raises a SyntaxError for a broken PNG.
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f'{path} does not decode: {error}') from None
    return (height, width) if turned else (width, height)


def check_listed_images(images: list[dict], folder: Path, name: str,
                        most: int | None) -> Findings:
    """Check that the images of a COCO file exist, can be decoded, and have the
    size that the file says.

    Args:
        images: the list 'images' of the COCO file.
        folder: the folder with the images.
        name: the name of the COCO file, for messages.
        most: number of images that are decoded, evenly spaced; None for all.
    """
    findings = Findings()
    paths = [os.path.join(folder, image['file_name']) for image in images]
    missing = missing_files(paths)
    if missing:
        findings.errors.append(
            f'{len(missing)} of {len(images)} images that {name} lists do '
            f'not exist, the first is {missing[0]}')
    gone = set(missing)
    for index in evenly_spaced(len(images), most):
        image, path = images[index], paths[index]
        if path in gone:
            continue
        try:
            size = image_size(path)
        except ValueError as error:
            findings.errors.append(str(error))
            continue
        listed = (image['width'], image['height'])
        if size != listed:
            findings.errors.append(
                f'{path} is {size[0]} x {size[1]} pixels as mmcv loads it, '
                f'but {name} says {listed[0]} x {listed[1]}: its boxes would '
                'be at wrong places')
    return findings


def check_label_maps(dataset: Any, option: str, most: int | None,
                     labelled: bool = True) -> Findings:
    """Check that every image of a segmentation data set has a label map of the
    same size, and that both can be decoded.

    Args:
        dataset: a data set of mmseg.
        option: the option that holds the data set in the config.
        most: number of pairs that are decoded, evenly spaced; None for all.
        labelled: whether its label maps are used.
    """
    findings = Findings()
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    if not infos:
        findings.errors.append(
            f'{option} finds no image that ends in '
            f'{dataset.img_suffix!r} in {dataset.data_prefix["img_path"]}: '
            'set img_suffix')
        return findings
    parts = (('images', 'img_path', 'img_suffix'),
             ('label maps', 'seg_map_path', 'seg_map_suffix'))
    labelled = labelled and 'seg_map_path' in infos[0]
    for what, key, advice in parts[:1 + labelled]:
        missing = missing_files(info[key] for info in infos)
        if missing:
            findings.errors.append(
                f'{len(missing)} of {len(infos)} {what} of {option} do not '
                f'exist, the first is {missing[0]}; is {advice}='
                f'{getattr(dataset, advice)!r} right?')
    if findings.errors:
        return findings
    for index in evenly_spaced(len(infos), most):
        try:
            image = infos[index]['img_path']
            size = image_size(image)
            if not labelled:
                continue
            label = infos[index]['seg_map_path']
            label_size = image_size(label, upright=False)
        except ValueError as error:
            findings.errors.append(str(error))
            continue
        if size != label_size:
            findings.errors.append(
                f'{image} is {size[0]} x {size[1]} pixels and its label map '
                f'{label} {label_size[0]} x {label_size[1]}')
    return findings
