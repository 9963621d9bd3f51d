"""Label maps against the decode head, before the first iteration."""
from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from rmoe.engine.image_check import evenly_spaced
from rmoe.engine.wrappers import unwrapped
from rmoe.parallel.together import together
from rmoe.registry import HOOKS


@HOOKS.register_module()
class LabelCheckHook(Hook):
    """Looks at label maps before the first iteration of a segmentor.

    Ranks share the files, and all of them raise or none.

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
        head = decode_head(unwrapped(runner.model))
        if head is None:
            return
        datasets = list(leaf_datasets(runner.train_dataloader.dataset))
        files = [(dataset, index) for dataset in datasets for index in
                 evenly_spaced(len(dataset), self.max_files)]

        def check_share() -> int:
            share = files[get_rank()::get_world_size()]
            for dataset, index in share:
                check_labels(dataset, index, head.num_classes,
                             head.ignore_index)
            return len(share)

        checked = sum(together(check_share))
        total = sum(map(len, datasets))
        runner.logger.info(f'labels of {checked} of {total} training images '
                           f'lie in 0 to {head.num_classes - 1}')


def decode_head(model: nn.Module) -> Any:
    """What classifies the pixels of a segmentor, the last of a cascade; None
    for other models."""
    head = getattr(model, 'decode_head', None)
    return head[-1] if isinstance(head, nn.ModuleList) else head


def leaf_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets inside wrappers and concatenations."""
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from leaf_datasets(part)
    elif hasattr(dataset, 'dataset'):
        yield from leaf_datasets(dataset.dataset)
    else:
        yield dataset


def check_labels(dataset: Any, index: int, num_classes: int,
                 ignore_index: int) -> set[int]:
    """The labels of one label map, as the pipeline loads it; empty if it
    loads none.

    Raises:
        ValueError: for a label that is neither a class nor ignored.
    """
    load = next((transform for transform in dataset.pipeline.transforms
                 if type(transform).__name__ == 'LoadAnnotations'), None)
    if load is None:
        return set()
    result = load(dataset.get_data_info(index))
    labels = set(np.unique(result['gt_seg_map']).tolist())
    wrong = [label for label in sorted(labels)
             if label >= num_classes and label != ignore_index]
    if wrong:
        raise ValueError(
            f'{result["seg_map_path"]} has the labels {wrong[:8]}; the decode '
            f'head has num_classes={num_classes} (0 to {num_classes - 1}) and '
            f'ignore_index={ignore_index}. Set decode_head.num_classes, or '
            'reduce_zero_label=True in LoadAnnotations if 0 means "other"')
    return labels
