"""Measures how much memory and time the training of a config takes, on a few
real iterations of every stage."""
import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from rmoe.engine.memory import PeakMemory, keep_freed_memory
from rmoe.engine.residual_moe_hook import ResidualMoEHook
from rmoe.engine.roles import trainable_table
from rmoe.registry import type_name

# Hooks that write files, or that read all files again.
LEFT_OUT = ('CheckpointHook', 'LoggerHook', 'CostHook', 'LabelCheckHook',
            'SegVisualizationHook', 'DetVisualizationHook')
WARM_UP = 2


@dataclass
class StageCost:
    """The memory and time that a stage of training takes.

    Attributes:
        name: the name of the stage.
        start, end: its first iteration, and the one after its last.
        trains: a table of the parameters that train.
        gradients: bytes of the gradients.
        moments: bytes of the optimizer's state.
        working: bytes of activations and temporary tensors; None where they
            cannot be measured.
        peak: the largest number of bytes of all tensors, as CUDA counts them;
            None on the CPU.
        seconds: the median time of an iteration, with the loading of data.
        waiting: the part of these seconds that is spent waiting for the
            batch.
    """
    name: str
    start: int
    end: int
    trains: str = ''
    gradients: int = 0
    moments: int = 0
    working: int | None = None
    peak: int | None = None
    seconds: float = 0.
    waiting: float = 0.


def quiet_config(cfg: Config, work_dir: str) -> Config:
    """A copy of a config with the same training, which writes only a log below
    ``work_dir``."""
    cfg = copy.deepcopy(cfg)
    cfg.update(work_dir=work_dir, load_from=None, resume=False,
               launcher='none', log_level='ERROR',
               experiment_name=os.path.basename(work_dir),
               visualizer=dict(type='Visualizer', vis_backends=[],
                               name=os.path.basename(work_dir)))
    for split in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{split}_{part}'] = None
    # None switches off hooks that mmengine would add by default.
    cfg.default_hooks = {
        name: hook for name, hook in (cfg.get('default_hooks') or {}).items()
        if not _left_out(hook)} | dict(checkpoint=None, logger=None)
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or []
                        if not _left_out(hook)]
    return cfg


def _left_out(hook: Any) -> bool:
    return bool(hook) and type_name(hook) in LEFT_OUT


def measure(runner: Runner, batches: Iterator[Any], iters: int
            ) -> list[StageCost]:
    """Run training iterations of a runner: one of each stage to measure the
    memory, then, after a warm-up, ``iters`` of each to measure the time.

    Args:
        runner: a runner that has not trained yet.
        batches: batches of its training data.
        iters: number of iterations of each stage that are timed.
    """
    loop: Any = runner.build_train_loop(runner._train_loop)
    runner._train_loop = loop
    costs: list[StageCost] = []

    def run() -> None:
        runner.call_hook('before_train')
        runner.call_hook('before_train_epoch')
        costs.extend(_stages(runner))
        for cost in costs:
            _measure_memory(runner, next(batches), cost)
        if not torch.cuda.is_available():
            keep_freed_memory()  # tools/train.py does so too.
        for cost in costs:
            _measure_time(runner, batches, cost, iters)

    loop.run = run
    runner.train()
    return costs


def _stages(runner: Runner) -> list[StageCost]:
    for hook in runner.hooks:
        if isinstance(hook, ResidualMoEHook):
            starts = [0, *(stage.end for stage in hook.plan)]
            return [StageCost(stage.name, start, stage.end)
                    for stage, start in zip(hook.plan, starts)]
    return [StageCost('training', 0, runner.max_iters)]


def endless_batches(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader, epoch after epoch without end.

    Call this only once for a loader: an InfiniteSampler stops when an
    iterator over it is deleted.

    Raises:
        ValueError: if the loader has no batch.
    """
    while True:
        count = 0
        for batch in loader:
            yield batch
            count += 1
        if not count:
            dataset: Any = loader.dataset
            raise ValueError(
                f'train_dataloader gives no batch: {len(dataset)} '
                f'images with batch_size={loader.batch_size} and drop_last='
                f'{loader.drop_last}')


def _step(runner: Runner, batch: Any, iteration: int) -> None:
    """Run one iteration of the training loop as if it was number
    ``iteration``."""
    loop: Any = runner.train_loop
    loop._iter = iteration
    runner.model.train()
    if isinstance(loop, EpochBasedTrainLoop):
        loop.run_iter(iteration, batch)
    else:
        loop.run_iter(batch)


def _measure_memory(runner: Runner, batch: Any, cost: StageCost) -> None:
    """Run one training step, and measure its memory up to the update of the
    weights."""
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    seen: dict[str, int | None] = {}

    def before_update(*_: Any) -> None:
        seen['gradients'] = gradient_bytes(runner.model)
        seen['peak'] = watch.peak()

    handle = optimizer and optimizer.register_step_pre_hook(before_update)
    with PeakMemory() as watch:
        _step(runner, batch, cost.start)
    if handle:
        handle.remove()
    # With gradient accumulation this iteration may have no update, and then
    # the memory is that of the whole iteration.
    peak = seen.get('peak', watch.peak())
    cost.trains = trainable_table(runner.model)
    cost.gradients = seen.get('gradients') or gradient_bytes(runner.model)
    cost.moments = optimizer_bytes(runner.optim_wrapper)
    if peak is not None:
        cost.working = max(peak - cost.gradients, 0)


def _measure_time(runner: Runner, batches: Iterator[Any], cost: StageCost,
                  iters: int) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, waits = [], []
    for i in range(WARM_UP + iters):
        begin = _now(cuda)
        batch = next(batches)
        waited = time.perf_counter() - begin
        _step(runner, batch, cost.start)
        if i >= WARM_UP:
            times.append(_now(cuda) - begin)
            waits.append(waited)
    cost.seconds, cost.waiting = median(times), median(waits)
    if cuda:
        cost.peak = torch.cuda.max_memory_allocated()


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers of a model."""
    return sum(tensor.nbytes for part in (model.parameters, model.buffers)
               for tensor in part())


def gradient_bytes(model: torch.nn.Module) -> int:
    return sum(p.grad.nbytes for p in model.parameters()
               if p.grad is not None)


def optimizer_bytes(optim_wrapper: Any) -> int:
    """Bytes of the state of all optimizers, such as moments."""
    wrappers = (optim_wrapper.values() if hasattr(optim_wrapper, 'values')
                else [optim_wrapper])
    return sum(value.nbytes for wrapper in wrappers
               for state in wrapper.optimizer.state.values()
               for value in state.values() if isinstance(value, torch.Tensor))
