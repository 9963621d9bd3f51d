"""Reads the numbers that a run logged, by iteration."""
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOE = 'moe/'
# The scores by which a classifier, a segmentor or a detector is judged.
MAIN_SCORES = ('accuracy/top1', 'mIoU', 'coco/bbox_mAP', 'coco/segm_mAP',
               'pascal_voc/mAP')
# The keys in a line about a validation that are not scores.
NO_SCORES = ('data_time', 'time', 'step', 'iter', 'epoch', 'memory')

# The values of a quantity by iteration, in order.
Curve = dict[int, float]


@dataclass
class Scalars:
    """The numbers that a run logged.

    Attributes:
        train: the numbers of training by name (``loss``, ``time``,
            ``memory``, ...).
        scores: the scores of validation by name.
        layers: the numbers of RoutingStatsHook, by the name of the MoE layer
            and of the quantity (``load_0``, ``entropy``, ``dropped``,
            ``unrouted``).
    """
    train: dict[str, Curve] = field(default_factory=dict)
    scores: dict[str, Curve] = field(default_factory=dict)
    layers: dict[str, dict[str, Curve]] = field(default_factory=dict)

    def curves(self) -> Iterator[Curve]:
        yield from self.train.values()
        yield from self.scores.values()
        for layer in self.layers.values():
            yield from layer.values()

    def losses(self) -> dict[str, Curve]:
        """All losses except their sum."""
        return {name: curve for name, curve in self.train.items()
                if 'loss' in name and name != 'loss'}

    def task_loss(self) -> Curve:
        """The loss without the auxiliary losses ``loss_moe_*``, so that it can
        be compared with that of a dense model."""
        auxiliary = [curve for name, curve in self.train.items()
                     if name.startswith('loss_moe_')]
        return {step: value - sum(curve.get(step, 0.) for curve in auxiliary)
                for step, value in self.train.get('loss', {}).items()}

    def last_iteration(self) -> int:
        return max((max(curve) for curve in self.curves() if curve),
                   default=0)


def read_scalars(files: Iterable[Path], epoch_length: int | None) -> Scalars:
    """Read the numbers of all starts of a run.

    The numbers of a start replace everything that earlier starts logged from
    its first iteration on: a resumed run repeats these iterations, and one
    that did not resume is a new run in the same folder. Lines that were left
    unfinished when a run was killed are ignored.

    Args:
        files: ``scalars.json`` of each start, the oldest first.
        epoch_length: number of iterations of an epoch, which is needed if
            validation was logged by epoch; None if it is not known.
    """
    found = Scalars()
    for file in files:
        lines = list(_lines(file))
        first = next((line['step'] for line in lines if 'loss' in line), None)
        if first is not None:
            _drop_from(found, first)
        last = 0
        for line in lines:
            step = line['step']
            if any(key.startswith(MOE) for key in line):
                _add_layers(found.layers, line, step)
            elif 'loss' in line:
                last = step
                _add(found.train, line, step)
            elif step:  # A validation without training has step 0.
                # Where validation is logged by iteration, its step is not
                # before the last logged iteration. A smaller step is the
                # number of an epoch.
                if step < last:
                    step = step * epoch_length if epoch_length else last
                _add(found.scores, line, step, NO_SCORES)
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for text in file.read_text(errors='replace').splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get('step'), int):
            yield line


def _drop_from(found: Scalars, first: int) -> None:
    for curve in found.curves():
        for step in [step for step in curve if step >= first]:
            del curve[step]


def _add(curves: dict[str, Curve], line: Mapping[str, Any], step: int,
         left_out: tuple[str, ...] = ('step', 'iter', 'epoch')) -> None:
    for name, value in line.items():
        if name not in left_out and isinstance(value, (int, float)):
            curves.setdefault(name, {})[step] = float(value)


def _add_layers(layers: dict[str, dict[str, Curve]], line: Mapping[str, Any],
                step: int) -> None:
    for key, value in line.items():
        if key.startswith(MOE):
            layer, _, what = key.removeprefix(MOE).rpartition('/')
            layers.setdefault(layer, {}).setdefault(what, {})[step] = value
