"""A check before training that the head of a classifier fits its data."""
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from rmoe.checks.label_maps import leaf_datasets
from rmoe.engine.wrappers import unwrapped
from rmoe.registry import HOOKS


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Compares the head of an ImageClassifier with the classes of its data,
    and the classes of validation with those of training. Data sets that name
    no classes in their ``metainfo`` are left out.

    Raises:
        ValueError: before training, validation or testing, if the numbers of
            classes differ, both of which it names, or the classes differ.
    """

    def before_train(self, runner: Runner) -> None:
        train = _check(runner, 'training', runner.train_dataloader)
        if runner.val_loop is None:
            return
        val = _check(runner, 'validation', runner.val_dataloader)
        for i, (one, other) in enumerate(zip(train, val)):
            if one != other:
                raise ValueError(
                    f'label {i} is the class {one!r} in training and '
                    f'{other!r} in validation: both data sets must have the '
                    'same classes in the same order')

    def before_val(self, runner: Runner) -> None:
        _check(runner, 'validation', runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        _check(runner, 'test', runner.test_dataloader)


def _check(runner: Runner, split: str, dataloader: Any) -> tuple[str, ...]:
    """The classes of a split; empty if its data sets name none."""
    model = unwrapped(runner.model)
    classes: tuple[str, ...] = ()
    for dataset in leaf_datasets(dataloader.dataset):
        classes = tuple(getattr(dataset, 'metainfo', {}).get('classes', ()))
        if classes and len(classes) != model.num_classes:
            raise ValueError(
                f'the {split} data has {len(classes)} classes and the head '
                f'of the classifier num_classes={model.num_classes}: set '
                f'model.num_classes={len(classes)}')
    return classes
