"""What training a config costs in memory and time, measured on a few real
iterations of every stage."""
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

# Hooks that write, or look at every file again.
LEFT_OUT = ('CheckpointHook', 'LoggerHook', 'CostHook', 'LabelCheckHook',
            'SegVisualizationHook', 'DetVisualizationHook')
WARM_UP = 2


@dataclass
class StageCost:
    """What a stage of training costs.

    Attributes:
        name: of the stage.
        start, end: its first iteration and the one after its last.
        trains: table of what trains.
        gradients: bytes.
        moments: bytes of what the optimizer keeps.
        working: bytes of activations and temporaries; None where they cannot
            be measured.
        peak: bytes of all tensors at their most, as CUDA counts them; None
            on the CPU.
        seconds: of an iteration, loading of data included; the median.
        waiting: of these, seconds in which the batch was waited for.
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
    """The same training, writing nothing but a log below ``work_dir``."""
    cfg = copy.deepcopy(cfg)
    cfg.update(work_dir=work_dir, load_from=None, resume=False,
               launcher='none', log_level='ERROR',
               experiment_name=os.path.basename(work_dir),
               visualizer=dict(type='Visualizer', vis_backends=[],
                               name=os.path.basename(work_dir)))
    for split in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{split}_{part}'] = None
    # None is for those that mmengine has by default.
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
    """Run the runner's own training iterations: one of each stage for its
    memory, then ``iters`` of each, after warming up, for the time.

    Args:
        runner: that has not trained yet.
        batches: of its training data.
        iters: iterations of each stage that are timed.
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
            keep_freed_memory()  # as tools/train.py does
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
    """Epoch after epoch. To be made once for a loader: an InfiniteSampler
    ends with the first iterator over it that is dropped.

    Raises:
        ValueError: if the loader gives nothing.
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
    """One iteration of the loop, as if it was this one."""
    loop: Any = runner.train_loop
    loop._iter = iteration
    runner.model.train()
    if isinstance(loop, EpochBasedTrainLoop):
        loop.run_iter(iteration, batch)
    else:
        loop.run_iter(batch)


def _measure_memory(runner: Runner, batch: Any, cost: StageCost) -> None:
    """Of one step, up to its update."""
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
    # Without an update: gradients are accumulated over several iterations.
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
    """Parameters and buffers."""
    return sum(tensor.nbytes for part in (model.parameters, model.buffers)
               for tensor in part())


def gradient_bytes(model: torch.nn.Module) -> int:
    return sum(p.grad.nbytes for p in model.parameters()
               if p.grad is not None)


def optimizer_bytes(optim_wrapper: Any) -> int:
    """What optimizers keep of past gradients."""
    wrappers = (optim_wrapper.values() if hasattr(optim_wrapper, 'values')
                else [optim_wrapper])
    return sum(value.nbytes for wrapper in wrappers
               for state in wrapper.optimizer.state.values()
               for value in state.values() if isinstance(value, torch.Tensor))
