"""Data mistakes found before training, not hours later."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from rmoe.registry import HOOKS


def check_data_roots(cfg: Config, splits: tuple[str, ...]) -> None:
    """Does the data of a config exist?

    Args:
        cfg: a whole config.
        splits: of 'train', 'val', 'test': which dataloaders are used.

    Raises:
        FileNotFoundError: names the first folder or file that is missing,
            and the option that points elsewhere.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset, option in _dataset_configs(
                loader, f'{split}_dataloader.dataset'):
            for path in _paths(dataset):
                if not path.exists():
                    raise FileNotFoundError(
                        f'{path} does not exist, and {option} reads it. Put '
                        'or link your data there, or point elsewhere with '
                        f'--cfg-options {option}.data_root=PATH')


def _dataset_configs(loader: Any, option: str) -> Iterator[tuple[Any, str]]:
    """The innermost dataset configs (wrappers and concatenations opened)."""
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


def _paths(dataset: Any) -> Iterator[Path]:
    root = Path(dataset.get('data_root') or '')
    if dataset.get('data_root'):
        yield root
    names = [*(dataset.get('data_prefix') or {}).values(),
             dataset.get('ann_file')]
    for name in names:
        if isinstance(name, str) and name:
            yield root / name


@HOOKS.register_module()
class LabelCheckHook(Hook):
    """Looks at label maps before the first iteration of a segmentor.

    Args:
        max_files: label maps that are read, evenly spaced over the dataset.

    Raises:
        ValueError: (before training) for a label that is neither a class of
            the decode head nor its ignore_index; names file and fix.
    """

    def __init__(self, max_files: int = 1000) -> None:
        if max_files < 1:
            raise ValueError(f'max_files={max_files} must be at least 1')
        self.max_files = max_files

    def before_train(self, runner: Runner) -> None:
        model = runner.model
        head = getattr(model.module if is_model_wrapper(model) else model,
                       'decode_head', None)
        if head is None:
            return
        checked = total = 0
        for dataset in _leaf_datasets(runner.train_dataloader.dataset):
            step = -(-len(dataset) // self.max_files)
            for index in range(0, len(dataset), step):
                _check_labels(dataset, index, head.num_classes,
                              head.ignore_index)
                checked += 1
            total += len(dataset)
        runner.logger.info(f'labels of {checked} of {total} training images '
                           f'lie in 0 to {head.num_classes - 1}')


def _leaf_datasets(dataset: Any) -> Iterator[Any]:
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from _leaf_datasets(part)
    elif hasattr(dataset, 'dataset'):
        yield from _leaf_datasets(dataset.dataset)
    else:
        yield dataset


def _check_labels(dataset: Any, index: int, num_classes: int,
                  ignore_index: int) -> None:
    load = next((transform for transform in dataset.pipeline.transforms
                 if type(transform).__name__ == 'LoadAnnotations'), None)
    if load is None:
        return
    result = load(dataset.get_data_info(index))
    labels = np.unique(result['gt_seg_map'])
    wrong = [int(label) for label in labels
             if label >= num_classes and label != ignore_index]
    if wrong:
        raise ValueError(
            f'{result["seg_map_path"]} has the labels {wrong[:8]}; the decode '
            f'head has num_classes={num_classes} (0 to {num_classes - 1}) and '
            f'ignore_index={ignore_index}. Set decode_head.num_classes, or '
            'reduce_zero_label=True in LoadAnnotations if 0 means "other"')
