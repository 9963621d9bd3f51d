"""Examines a whole config before a training: data, model and checkpoints, and
how much time and memory the training takes.

tools/analysis_tools/check_config.py is the command for it.
"""
import contextlib
import io
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn

from rmoe.checks.checkpoints import (
    check_init,
    check_load_from,
    take_pretrained,
)
from rmoe.checks.class_weight import let_weights_meet_ignored_pixels
from rmoe.checks.coco_file import read_coco
from rmoe.checks.data import MAX_IMAGES, check_roots, examine_split
from rmoe.checks.findings import explain
from rmoe.checks.images import evenly_spaced
from rmoe.checks.label_findings import (
    MASK_HEADS,
    Classes,
    ignored_share,
    judge_labels,
)
from rmoe.checks.label_maps import LabelCount, count_labels, leaf_datasets
from rmoe.checks.model import (
    check_channels,
    check_losses,
    check_routers,
    describe_layers,
    hook_names,
    losses_of,
)
from rmoe.checks.step_cost import (
    WARM_UP,
    StageCost,
    endless_batches,
    measure,
    parameter_bytes,
    quiet_config,
)
from rmoe.engine.precision import set_precision
from rmoe.moe import moe_layers
from rmoe.moe.complexity import inactive_params
from rmoe.registry import MODELS, type_name

MAX_LABEL_MAPS = 1000


class Report:
    """Prints the lines of an examination, and keeps the problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def say(self, text: str) -> None:
        print(text, flush=True)

    def wrong(self, *texts: str) -> None:
        for text in texts:
            print(f'  ! {text}', flush=True)
        self.problems += texts

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Context for calls into libraries. An exception inside is reported as
        a problem with ``what``; printed output is dropped."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:
            self.wrong(f'{what}: {explain(error)}')


def examine(cfg: Config, report: Report, everything: bool, iters: int
            ) -> None:
    """Examine all parts of a config, then train a few iterations.

    Args:
        cfg: the config of the training.
        report: prints the results, and keeps the problems.
        everything: whether to read every image and label map, instead of only
            ``MAX_IMAGES`` and ``MAX_LABEL_MAPS`` of each split.
        iters: number of iterations of each stage that are timed.
    """
    with tempfile.TemporaryDirectory(prefix='check_config_') as folder:
        report.say('data')
        dataset = examine_data(cfg, everything, report)
        pretrained = take_pretrained(cfg.model)
        quiet = quiet_config(cfg, folder)
        report.say('model')
        runner = batch = None
        batches: Any = None
        with report.part('the model or its training cannot be built'):
            set_precision(quiet, False)
            runner = Runner.from_cfg(quiet)
        model = runner.model if runner else None
        # LabelCheckHook does this in a training, but quiet_config removes the
        # hook.
        if model and 'LabelCheckHook' in hook_names(cfg):
            let_weights_meet_ignored_pixels(model)
        if dataset is not None:
            with report.part('train_dataloader'):
                loader = Runner.build_dataloader(
                    dict(quiet.train_dataloader, dataset=dataset),
                    seed=runner.seed if runner else 0)
                batches = endless_batches(loader)
                batch = next(batches)
        fits = batch is not None and examine_channels(
            cfg, model, batch, report)
        if runner is None:
            return
        examine_model(cfg, model, batch if fits else None, report)
        examine_checkpoints(cfg, model, pretrained, report)
        if report.problems:
            report.say('training: not tried, because of the problems above')
            return
        report.say(f'training, on {device_name()}: {WARM_UP + 1 + iters} '
                   'iterations of each stage')
        costs: list[StageCost] = []
        with report.part('training'):
            runner._train_dataloader = loader
            costs += measure(runner, batches, iters)
        if not report.problems:
            show_costs(runner, costs, report)


def examine_data(cfg: Config, everything: bool, report: Report) -> Any:
    """Examine the data of all splits.

    Returns:
        The training data set, or None if it cannot be built.
    """
    read = lru_cache(maxsize=1)(read_coco)
    built: dict[str, Any] = {}
    for split in ('train', 'val', 'test'):
        name = f'{split}_dataloader'
        loader = cfg.get(name)
        if not loader:
            if split == 'train':
                report.wrong('the config has no train_dataloader')
            continue
        if split == 'test' and loader == cfg.get('val_dataloader'):
            report.say('  test: the same as val')
            continue
        try:
            check_roots(cfg, (split, ))
        except FileNotFoundError as error:
            report.wrong(str(error))
            continue
        found = None
        with report.part(name):
            found = examine_split(
                cfg, split, None if everything else MAX_IMAGES, read)
        if found is None:
            continue
        for note in found.notes:
            report.say(f'  {note}')
        report.wrong(*found.errors)
        if found.errors:
            continue
        with report.part(name):
            built[split] = dataset = DATASETS.build(loader.dataset)
            count = len(dataset)
        if split in built:
            kinds = {type(leaf).__name__ for leaf in leaf_datasets(dataset)}
            report.say(f'  {split}: {count:,} images, '
                       f'{", ".join(sorted(kinds))}')
            examine_labels(cfg.model, dataset, name, everything, report)
    return built.get('train')


def examine_labels(model: Any, dataset: Any, name: str, everything: bool,
                   report: Report) -> None:
    """Compare the labels of a data set with the decode head of a segmentor, or
    its number of classes with a classifier."""
    head = model.get('decode_head')
    where = 'model.decode_head' if head else 'model'
    if isinstance(head, (list, tuple)):
        head, where = head[-1], f'model.decode_head.{len(head) - 1}'
    number = (head or model).get('num_classes')
    if number is None:
        return  # Heads of detectors were compared by examine_split.
    leaves = list(leaf_datasets(dataset))
    for leaf in leaves:
        names = getattr(leaf, 'metainfo', {}).get('classes')
        if names is not None and len(names) != number:
            report.wrong(f'{name} has {len(names)} classes and {where}.'
                         f'num_classes={number}: set {where}.num_classes='
                         f'{len(names)}, or metainfo=dict(classes=(...))')
    if not head:
        return
    classes = Classes(number, head.get('ignore_index', 255),
                      getattr(leaves[0], 'metainfo', {}).get('classes') or (),
                      type_name(head) not in MASK_HEADS)
    counts = []
    for leaf in leaves:
        count = LabelCount()
        for index in evenly_spaced(
                len(leaf), None if everything else MAX_LABEL_MAPS):
            count.add(count_labels(leaf, index))
        counts.append(count)
        labels = classes.seen(count.pixels)
        if labels:
            share = 100 * ignored_share(count, classes)
            report.say(f'    labels {labels[0]} to {labels[-1]} in '
                       f'{count.maps} label maps; {where} has {number} '
                       f'classes; {share:.1f} % of the pixels are ignored')
    found = judge_labels(counts, classes, sum(map(len, leaves)),
                         trains=name == 'train_dataloader')
    for note in found.notes:
        report.say(f'    {note}')
    report.wrong(*found.errors)


def examine_channels(cfg: Config, model: nn.Module | None, batch: Any,
                     report: Report) -> bool:
    """Compare the channels of images and feature maps with the config.

    Returns:
        Whether they fit, so that a forward pass can be tried.
    """
    found: list[str] = []
    keys = [key for key in ('backbone', 'neck') if cfg.model.get(key)]
    if model is None:
        # Some part of the model cannot be built, which was reported. Often it
        # is a head, because of wrong channels. So backbone and neck are built
        # alone, to find that out.
        try:
            parts = {key: MODELS.build(cfg.model[key]) for key in keys}
        except Exception:
            return False
    else:
        parts = {key: getattr(model, key) for key in keys}
    with report.part('feature maps'):
        device = next(parts['backbone'].parameters()).device
        image = batch['inputs'][0].to(device, torch.float32)
        found = check_channels(cfg.model, parts, image[None])
    report.wrong(*found)
    return not found


def examine_model(cfg: Config, model: Any, batch: Any, report: Report
                  ) -> None:
    layers = moe_layers(model)
    total = sum(p.numel() for p in model.parameters())
    active = total - sum(map(inactive_params, layers.values()))
    report.say(f'  {total:,} parameters, {active:,} active')
    report.say(f'  {len(layers)} MoE layers')
    for line in describe_layers(model):
        report.say(f'    {line}')
    hooks = hook_names(cfg)
    report.wrong(*check_routers(model, hooks))
    if batch is None:
        return
    losses: dict[str, float] = {}
    auxiliary: list[str] = []
    with report.part('a forward pass in training'):
        losses, auxiliary = losses_of(model, batch)
    report.wrong(*check_losses(losses, auxiliary, hooks))
    if auxiliary:
        report.say(f'  auxiliary losses: {", ".join(auxiliary)}')


def examine_checkpoints(cfg: Config, model: Any, pretrained: list,
                        report: Report) -> None:
    results = [check_init(model, where, init) for where, init in pretrained]
    if cfg.get('load_from'):
        results.append(check_load_from(model, cfg.load_from))
    for line, problems in results:
        if problems:
            report.wrong(*problems)
        else:
            report.say(f'  {line}')
    if not results:
        report.say('  no checkpoint: training starts from random weights')


def show_costs(runner: Runner, costs: list[StageCost],
               report: Report) -> None:
    weights = parameter_bytes(runner.model)
    total = 0.
    for cost in costs:
        count = cost.end - cost.start
        total += count * cost.seconds
        report.say(f'  stage {cost.name}: {count:,} iterations, {cost.start} '
                   f'to {cost.end - 1}, {cost.seconds:.3f} s each '
                   f'({cost.waiting:.3f} s of them waiting for data)')
        for line in cost.trains.splitlines():
            report.say(f'    {line}')
        memory = (f'weights {size(weights)}, optimizer {size(cost.moments)}, '
                  f'gradients {size(cost.gradients)}')
        if cost.working is not None:
            everything = cost.peak or (weights + cost.moments +
                                       cost.gradients + cost.working)
            memory += (f', activations {size(cost.working)}: '
                       f'{size(everything)} in all')
        report.say(f'    memory: {memory}')
    end = datetime.now() + timedelta(seconds=total)
    report.say(f'  {timedelta(seconds=round(total))} (h:mm:ss) in all, without '
               'validation and saving: '
               f'started now, it ends on {end:%Y-%m-%d at %H:%M}')


def size(count: int) -> str:
    return (f'{count / 1e9:.2f} GB' if count >= 1e9 else
            f'{count / 1e6:.1f} MB')


def device_name() -> str:
    return (torch.cuda.get_device_name() if torch.cuda.is_available() else
            f'the CPU ({torch.get_num_threads()} threads)')
