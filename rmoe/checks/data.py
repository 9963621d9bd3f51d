"""Finds mistakes in the data of a config before training, which would otherwise
show only hours later. The tools that train and test call it."""
import logging
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import print_log

from rmoe.checks.coco import CocoUse, check_coco
from rmoe.checks.coco_file import read_coco
from rmoe.checks.findings import Findings
from rmoe.checks.images import (
    check_label_maps,
    check_listed_images,
    is_local,
)
from rmoe.parallel.together import together
from rmoe.registry import DATASETS, type_name

MAX_IMAGES = 200


def check_data(cfg: Config, splits: tuple[str, ...],
               max_images: int | None = MAX_IMAGES) -> list[str]:
    """Check that the data of a config exists, is complete, and fits the config.

    Each rank checks that folders and files exist, because it may have a disk
    of its own. Only the first rank reads them: COCO annotations
    (:func:`rmoe.checks.coco.check_coco`), and the images of COCO's and
    mmseg's data sets. If one rank finds a mistake, all ranks raise.

    Args:
        cfg: a whole config.
        splits: the dataloaders that will be used, of 'train', 'val' and
            'test'.
        max_images: number of images of each data set that are decoded, evenly
            spaced; None for all.

    Returns:
        Notes about data that mmdet changes or drops silently. The first rank
        also logs them.

    Raises:
        FileNotFoundError: names the first folder or file that is missing,
            and the option that sets another place.
        ValueError: names file, mistake and fix, one line for each mistake.
    """
    return together(lambda: _check(cfg, splits, max_images))[0]


def _check(cfg: Config, splits: tuple[str, ...], max_images: int | None
           ) -> list[str]:
    check_roots(cfg, splits)
    if not is_main_process():
        return []
    # The splits for validation and test often read the same file, which is
    # then parsed only once.
    read = lru_cache(maxsize=1)(read_coco)
    findings = Findings()
    for split in splits:
        findings.extend(examine_split(cfg, split, max_images, read))
    for note in findings.notes:
        print_log(note, 'current', logging.WARNING)
    if findings.errors:
        raise ValueError('\n'.join(findings.errors))
    return findings.notes


def check_roots(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that the folders and annotation files of a config exist.

    Raises:
        FileNotFoundError: names the first that is missing, and the option
            that sets another place.
    """
    for split in splits:
        for dataset, option in _leaves(cfg, split):
            if dataset.get('backend_args'):
                continue
            for path in _paths(dataset):
                if is_local(path) and not Path(path).exists():
                    raise FileNotFoundError(
                        f'{path} does not exist, and {option} reads it. Put '
                        'or link your data there, or point elsewhere with '
                        f'--cfg-options {option}.data_root=PATH')


def examine_split(cfg: Config, split: str, max_images: int | None,
                  read: Any = read_coco) -> Findings:
    """Check the data of one split, whose folders exist.

    Args:
        cfg: a whole config.
        split: 'train', 'val' or 'test'.
        max_images: see :func:`check_data`.
        read: the function that parses COCO files.
    """
    findings = Findings()
    for dataset, option in _leaves(cfg, split):
        kind = _dataset_class(cfg, dataset)
        # The number of classes is not compared where the data set reads its
        # classes from a file, where they are text prompts (return_classes),
        # and for panoptic data, in which only things have boxes.
        if (_bases(kind, 'BaseDetDataset')
                and not _bases(kind, 'CocoPanopticDataset')
                and not dataset.get('return_classes')
                and (classes := _classes(kind, dataset))):
            findings.errors += check_num_classes(
                cfg.get('model') or {}, classes, option)
        if dataset.get('backend_args') or not all(
                map(is_local, _paths(dataset))):
            continue
        if _reads_as_coco(kind):
            findings.extend(_examine_coco(
                cfg, split, dataset, option, kind, max_images, read))
        elif _bases(kind, 'BaseSegDataset') and _uses(
                dataset, 'LoadImageFromFile'):
            findings.extend(check_label_maps(
                _build(cfg, dataset), option, max_images,
                _uses(dataset, 'LoadAnnotations')))
    return findings


def _examine_coco(cfg: Config, split: str, dataset: Any, option: str,
                  kind: Any, max_images: int | None, read: Any) -> Findings:
    if not dataset.get('ann_file'):
        return Findings([f'{option} has no ann_file: set it to the annotation '
                         'file'])
    path = Path(dataset.get('data_root') or '', dataset['ann_file'])
    findings = Findings(_check_evaluators(cfg, split, path))
    needs_boxes = split != 'test' or not any(
        evaluator.get('format_only') for evaluator in _evaluators(cfg, split))
    try:
        content = read(path, needs_boxes)
    except ValueError as error:
        findings.errors.append(str(error))
        return findings
    found = check_coco(content, CocoUse(
        str(path), option, _classes(kind, dataset),
        None if dataset.get('test_mode') else dataset.get('filter_cfg') or {},
        any(step.get('with_mask') for step in dataset.get('pipeline', ())),
        needs_boxes))
    findings.extend(found)
    if not found.errors and _uses(dataset, 'LoadImageFromFile'):
        folder = Path(dataset.get('data_root') or '',
                      (dataset.get('data_prefix') or {}).get('img', ''))
        findings.extend(check_listed_images(
            _images_in_use(content, dataset), folder, str(path), max_images))
    return findings


def _images_in_use(content: dict[str, list[dict]], dataset: Any
                   ) -> list[dict]:
    filters = dataset.get('filter_cfg') or {}
    if dataset.get('test_mode') or not filters.get('filter_empty_gt'):
        return content['images']
    annotated = {ann['image_id'] for ann in content['annotations']}
    return [image for image in content['images'] if image['id'] in annotated]


def check_num_classes(model: Mapping, classes: Any, option: str) -> list[str]:
    """Name the heads of a detector whose num_classes differs from the number
    of classes of the data."""
    return [
        f'{name}.num_classes={number} and {option} has {len(classes)} classes '
        f'{tuple(classes)[:8]}: set {name}.num_classes={len(classes)}, or '
        'metainfo=dict(classes=(...))'
        for name, number in _heads(model, 'model') if number != len(classes)]


def _heads(model: Any, name: str) -> Iterator[tuple[str, int]]:
    """The name and num_classes of every head that classifies boxes or
    masks."""
    for key in ('bbox_head', 'mask_head', 'roi_head'):
        heads = model.get(key)
        many = isinstance(heads, (list, tuple))
        for i, head in enumerate(heads if many else [heads]):
            if not isinstance(head, Mapping):
                continue
            where = f'{name}.{key}.{i}' if many else f'{name}.{key}'
            if 'num_classes' in head and not head.get('class_agnostic'):
                yield where, head['num_classes']
            yield from _heads(head, where)


def _check_evaluators(cfg: Config, split: str, path: Path) -> list[str]:
    """Name the evaluators that read another annotation file than the data
    set does."""
    return [
        f'{split}_evaluator reads {other}, and {split}_dataloader {path}: '
        f'set {split}_evaluator.ann_file={path}'
        for evaluator in _evaluators(cfg, split)
        if (other := evaluator.get('ann_file')) and is_local(other)
        and os.path.realpath(other) != os.path.realpath(path)
        and sum(1 for _ in _leaves(cfg, split)) == 1]


def _evaluators(cfg: Config, split: str) -> list[Any]:
    found = cfg.get(f'{split}_evaluator') or {}
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _leaves(cfg: Config, split: str) -> Iterator[tuple[Any, str]]:
    option = f'{split}_dataloader'
    return _dataset_configs(cfg.get(option), f'{option}.dataset')


def _dataset_configs(loader: Any, option: str) -> Iterator[tuple[Any, str]]:
    """The configs of the data sets inside of wrappers and concatenations, and
    the option of each."""
    dataset = (loader or {}).get('dataset')
    if not dataset:
        return
    if 'dataset' in dataset:
        yield from _dataset_configs(dataset, f'{option}.dataset')
    elif 'datasets' in dataset:
        for i, part in enumerate(dataset['datasets']):
            yield from _dataset_configs(dict(dataset=part),
                                        f'{option}.datasets.{i}')
    else:
        yield dataset, option


def _paths(dataset: Any) -> Iterator[str]:
    root = dataset.get('data_root') or ''
    if root:
        yield root
    names = [*(dataset.get('data_prefix') or {}).values(),
             dataset.get('ann_file')]
    for name in names:
        if isinstance(name, str) and name:
            yield os.path.join(root, name) if is_local(name) else name


def _dataset_class(cfg: Config, dataset: Any) -> Any:
    with DATASETS.switch_scope_and_registry(
            cfg.get('default_scope')) as registry:
        kind = dataset.get('type')
        return registry.get(kind) if isinstance(kind, str) else kind


def _build(cfg: Config, dataset: Any) -> Any:
    """Build a data set without its pipeline."""
    with DATASETS.switch_scope_and_registry(
            cfg.get('default_scope')) as registry:
        # mmengine fails to serialise the data of an empty data set.
        return registry.build(dict(dataset, pipeline=[],
                                   serialize_data=False))


def _bases(kind: Any, name: str) -> Any:
    """The base class of a class that has this name, or None. Classes of host
    libraries are recognised by their names, because the libraries may not be
    installed."""
    return next((base for base in getattr(kind, '__mro__', ())
                 if base.__name__ == name), None)


def _reads_as_coco(kind: Any) -> bool:
    """Whether a class reads its data as CocoDataset does. Objects365 and LVIS
    are subclasses of it that do not."""
    base = _bases(kind, 'CocoDataset')
    return base is not None and all(
        getattr(kind, method) is getattr(base, method)
        for method in ('load_data_list', 'parse_data_info', 'filter_data'))


def _classes(kind: Any, dataset: Any) -> Any:
    return kind._load_metainfo(dataset.get('metainfo')).get('classes', ())


def _uses(dataset: Any, transform: str) -> bool:
    """Whether the pipeline has a transform with this type. A transform of the
    user has another one."""
    return any(type_name(step) == transform
               for step in dataset.get('pipeline', ()))
