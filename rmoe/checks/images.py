"""Image files that are missing or do not decode."""
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mmcv
from PIL import Image, UnidentifiedImageError

from rmoe.checks.findings import Findings

ORIENTATION = 0x0112  # of EXIF; from 5 on, sides are swapped


def is_local(path: str | Path) -> bool:
    """False for what a backend reads from elsewhere ('s3://...')."""
    return ':/' not in str(path)


def evenly_spaced(count: int, most: int | None) -> range:
    """Indices of at most ``most`` of ``count`` things, all if it is None."""
    return range(0, count, max(-(-count // most) if most else 1, 1))


def missing_files(paths: Iterable[str]) -> list[str]:
    """Those that do not exist; each folder is listed once, which is faster
    than asking for each file."""
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
    """(width, height) of a file that decodes wholly.

    Args:
        path: the file.
        upright: turned as its EXIF data say, as mmcv loads images.

    Raises:
        ValueError: if it does not decode; names it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            turned = upright and image.getexif().get(ORIENTATION, 1) >= 5
            width, height = image.size
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        # Pillow does not know, or trust, all that OpenCV reads.
        if not os.path.getsize(path):
            raise ValueError(f'{path} is empty (0 bytes)') from None
        array = mmcv.imread(path, flag='unchanged', backend='cv2')
        if array is None:
            raise ValueError(f'{path} does not decode: {error}') from None
        return array.shape[1], array.shape[0]
    # A broken PNG is a SyntaxError to Pillow.
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f'{path} does not decode: {error}') from None
    return (height, width) if turned else (width, height)


def check_listed_images(images: list[dict], folder: Path, name: str,
                        most: int | None) -> Findings:
    """Are a COCO file's images there, whole, and of the size it says?

    Args:
        images: its 'images'.
        folder: where they are.
        name: of the COCO file, for messages.
        most: images that are decoded, evenly spaced; None for all.
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
                f'and {name} says {listed[0]} x {listed[1]}: its boxes would '
                'lie elsewhere')
    return findings


def check_label_maps(dataset: Any, option: str, most: int | None,
                     labelled: bool = True) -> Findings:
    """Has every image of a segmentation data set a label map of its size,
    and do both decode?

    Args:
        dataset: one of mmseg's.
        option: of the data set in the config.
        most: pairs that are decoded, evenly spaced; None for all.
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
