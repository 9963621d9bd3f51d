"""Compares label maps with the decode head before the first iteration."""
from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from rmoe.checks.class_weight import let_weights_meet_ignored_pixels
from rmoe.checks.images import evenly_spaced
from rmoe.checks.label_findings import (
    MASK_HEADS,
    Classes,
    ignored_share,
    judge_labels,
)
from rmoe.checks.label_maps import LabelCount, count_labels, leaf_datasets
from rmoe.engine.wrappers import unwrapped
from rmoe.parallel.together import together
from rmoe.registry import HOOKS


@HOOKS.register_module()
class LabelCheckHook(Hook):
    """Checks the label maps of a segmentor before the first iteration.

    Each rank reads a part of the files, and all ranks raise or none. What may
    be intended is only a warning in the log: classes that never occur, many
    ignored pixels, labels that look shifted by one.

    The hook also makes losses of mmseg with ``class_weight`` work on ignored
    pixels (:mod:`rmoe.checks.class_weight`).

    Args:
        max_files: number of label maps of each data set that are read, evenly
            spaced.

    Raises:
        ValueError: (before training) for label maps in colour, for labels
            that are neither a class of the decode head nor its ignore_index,
            and for maps from which nothing can be learnt, such as those with
            the values 0 and 255 only; names files and fix.
    """

    def __init__(self, max_files: int = 1000) -> None:
        if max_files < 1:
            raise ValueError(f'max_files={max_files} must be at least 1')
        self.max_files = max_files

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        losses = let_weights_meet_ignored_pixels(model)
        if losses:
            runner.logger.info(
                f'{", ".join(losses)}: rmoe computes the mean under '
                'class_weight, because mmseg fails on ignored pixels')
        head = decode_head(model)
        if head is None:
            return
        # A head of someone's own may not derive from mmseg's BaseDecodeHead.
        missing = [name for name in ('num_classes', 'ignore_index')
                   if not hasattr(head, name)]
        if missing:
            runner.logger.info(
                f'label maps are not checked: the {type(head).__name__} has '
                f'no {" and no ".join(missing)}')
            return
        datasets = list(leaf_datasets(runner.train_dataloader.dataset))
        files = [(place, index) for place, dataset in enumerate(datasets)
                 for index in evenly_spaced(len(dataset), self.max_files)]

        def count_share() -> list[LabelCount]:
            counts = [LabelCount() for _ in datasets]
            for place, index in files[get_rank()::get_world_size()]:
                counts[place].add(count_labels(datasets[place], index))
            return counts

        counts, *others = together(count_share)
        for other in others:
            for count, more in zip(counts, other, strict=True):
                count.add(more)
        classes = classes_of(head, datasets)
        total = sum(map(len, datasets))
        # Every rank has the counts of all ranks, so all raise or none.
        findings = judge_labels(counts, classes, total)
        for note in findings.notes:
            runner.logger.warning(note)
        if findings.errors:
            raise ValueError('\n'.join(findings.errors))
        runner.logger.info(summary(counts, classes, total))


def summary(counts: list[LabelCount], classes: Classes, total: int) -> str:
    """A line for the log that says which label maps were read and which labels
    they have."""
    whole = LabelCount()
    for count in counts:
        whole.add(count)
    read = f'labels of {whole.maps} of {total} training images'
    if whole.converters:
        return (f'{read} were read; {", ".join(whole.converters)} may change '
                'them after that, so that classes are not counted')
    return (f'{read} lie in 0 to {classes.number - 1}, '
            f'{100 * ignored_share(whole, classes):.1f} % of their pixels '
            'are ignored')


def classes_of(head: Any, datasets: list[Any]) -> Classes:
    """The classes of a head that was built, with the names that the first data
    set has for them."""
    names = getattr(datasets[0], 'metainfo', {}).get('classes') or ()
    return Classes(head.num_classes, head.ignore_index, names, not any(
        base.__name__ in MASK_HEADS for base in type(head).__mro__))


def decode_head(model: nn.Module) -> Any:
    """The decode head of a segmentor, which is the last one of a cascade; None
    for other models."""
    head = getattr(model, 'decode_head', None)
    return head[-1] if isinstance(head, nn.ModuleList) else head
