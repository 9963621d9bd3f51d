"""Measures what a training run costs in time, operations and memory, and
writes it to a file, so that runs can be compared."""
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from rmoe import compat
from rmoe.moe import moe_layers
from rmoe.moe.products import unpadded
from rmoe.registry import HOOKS
from rmoe.upcycling import write_atomically

# Formulas for the attention kernel of the CPU, which torch's counter does not
# know. The counter knows other kernels, but to force one of them while
# counting would change the numbers that the model computes in that step.
ATTENTION: dict[Any, Callable[..., int]] = dict(zip(compat.cpu_attention, (
    lambda query, key, value, *_, **__:
        sdpa_flop_count(query, key, value),
    lambda grad, query, key, value, *_, **__:
        sdpa_backward_flop_count(grad, query, key, value))))


@HOOKS.register_module()
class CostHook(Hook):
    """Writes what training costs to ``cost.json`` in the work dir, at every
    checkpoint and at the end.

    - ``seconds``: time in training iterations, with the loading of data
      (except for the batch after a checkpoint); ``device_seconds``: the same
      multiplied by the number of ranks; ``wall_seconds``: the time with
      validation and saving.
    - ``samples``: number of images on all ranks; ``iterations``: number of
      forward and backward passes. With gradient accumulation several of them
      make one step of the optimizer.
    - ``flops``: operations on all ranks (a multiply-add is two), forward and
      backward as they are executed. So the backward pass of a frozen
      parameter does not count, and what activation checkpointing computes
      again counts again. torch's counter measures the first iteration of each
      stage, and its operations per image are taken for the whole stage. The
      counter knows matrix products, convolutions and attention, but no
      compiled operator of mmcv.
    - ``peak_memory``: bytes on the first rank. On a GPU it is the most memory
      that tensors had, on a CPU the largest resident size of the process.
    - ``stages``: the operations and numbers of each stage. A stage is a set
      of parameters that train together, and is named by a hash of it.

    A checkpoint keeps the cost of its run, and a resumed run adds to it.
    """
    # The hook must run after ResidualMoEHook, which begins stages, and before
    # LoggerHook, which resets CUDA's record of the peak.
    priority = 'NORMAL'

    def __init__(self) -> None:
        self.clock = Clock()
        self.stages: dict[str, dict[str, int]] = {}
        self._saved: dict[str, Any] = {}
        self._peak = 0
        self._skips_data = False
        self._began = time.perf_counter()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume:
            self._saved = checkpoint.get('meta', {}).get(
                'rmoe_cost', {})

    def before_train(self, runner: Runner) -> None:
        if runner.iter and not self._saved:
            runner.logger.warning(
                'the checkpoint does not say what its training cost: '
                f'cost.json counts from iteration {runner.iter} on')
            self._saved = dict(from_iteration=runner.iter)
        model = runner.model
        self._parameters = list(model.parameters())
        self._layers = list(moe_layers(model).values())
        self.stages = {key: dict(stage) for key, stage in
                       self._saved.get('stages', {}).items()}
        self._began = time.perf_counter()
        # A resumed loop that counts iterations first reads and drops the
        # batches that it has trained on, which shall not count.
        self._skips_data = runner.iter > 0

    def before_train_epoch(self, runner: Runner) -> None:
        if not self._skips_data:
            self.clock.start()

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: Any = None) -> None:
        self.clock.start()
        self._skips_data = False
        key = self._stage_key()
        samples = _batch_size(data_batch, runner)
        if key not in self.stages:
            self.stages[key] = dict(
                iterations=0, samples=0, measured_flops=0,
                measured_samples=samples,
                trainable_parameters=sum(
                    p.numel() for p in self._parameters if p.requires_grad),
                moe_layers=len(self._layers), core_only_layers=sum(
                    layer.core_only for layer in self._layers))
            _count_once(runner.model, self.stages[key])
        self.stages[key]['iterations'] += 1
        self.stages[key]['samples'] += samples * get_world_size()

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        if torch.cuda.is_available():
            self._peak = max(self._peak, torch.cuda.max_memory_allocated())

    def before_val_epoch(self, runner: Runner) -> None:
        self.clock.stop()

    def after_val_epoch(self, runner: Runner,
                        metrics: dict[str, float] | None = None) -> None:
        self.clock.start()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.clock.stop()
        checkpoint['meta']['rmoe_cost'] = self._write(runner)

    def after_train(self, runner: Runner) -> None:
        self.clock.stop()
        if is_main_process():
            cost = self._write(runner)
            runner.logger.info(
                f'training took {cost["seconds"]:.0f} s, {cost["samples"]} '
                f'samples, {cost["flops"]:.3g} operations and at most '
                f'{cost["peak_memory"] / 1e9:.2f} GB')

    def _stage_key(self) -> str:
        """A name for the set of parameters that train and of layers that run
        only their core. It is the same in a resumed run."""
        bits = bytes(p.requires_grad for p in self._parameters) + bytes(
            layer.core_only for layer in self._layers)
        return hashlib.sha256(bits).hexdigest()[:12]

    def _write(self, runner: Runner) -> dict[str, Any]:
        cost = self.summary()
        write_atomically(os.path.join(runner.work_dir, 'cost.json'),
                         json.dumps(cost, indent=1).encode())
        return cost

    def summary(self) -> dict[str, Any]:
        """The cost so far, as it is written to the file."""
        stages = {
            key: dict(stage, flops=stage['measured_flops'] *
                      stage['samples'] // stage['measured_samples'])
            for key, stage in self.stages.items()}
        saved, world_size = self._saved, get_world_size()
        wall = time.perf_counter() - self._began
        return dict(
            seconds=saved.get('seconds', 0.) + self.clock.seconds,
            device_seconds=saved.get('device_seconds', 0.) +
            self.clock.seconds * world_size,
            wall_seconds=saved.get('wall_seconds', 0.) + wall,
            **{what: sum(stage[what] for stage in stages.values())
               for what in ('iterations', 'samples', 'flops')},
            peak_memory=max(saved.get('peak_memory', 0),
                            self._peak or _resident()),
            device=torch.cuda.get_device_name() if torch.cuda.is_available()
            else f'cpu, {torch.get_num_threads()} threads',
            world_size=world_size,
            from_iteration=saved.get('from_iteration', 0),
            stages=stages)


class Clock:
    """A stopwatch. Starting it while it runs, or stopping it while it stands
    still, changes nothing.

    Attributes:
        seconds: the time it has run in all, up to the last stop.
    """

    def __init__(self) -> None:
        self.seconds = 0.
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None


def _count_once(model: Any, stage: dict[str, int]) -> None:
    """Count the operations of the model's next training step."""
    step, of_instance = model.train_step, 'train_step' in vars(model)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if of_instance:  # mmengine puts a compiled train_step there
            model.train_step = step
        else:
            del model.train_step
        with unpadded(), FlopCounterMode(
                display=False, custom_mapping=ATTENTION) as counter:
            result = step(*args, **kwargs)
        stage['measured_flops'] = counter.get_total_flops()
        return result

    model.train_step = counted


def _batch_size(batch: Any, runner: Runner) -> int:
    """The number of images in a batch of one rank."""
    if isinstance(batch, dict) and 'inputs' in batch:
        inputs = batch['inputs']
        # Semi-supervised models of mmdet get a dict with the images of each
        # branch.
        return (sum(map(len, inputs.values())) if isinstance(inputs, dict)
                else len(inputs))
    loader = runner.train_dataloader
    return loader.batch_size or loader.batch_sampler.batch_size


def _resident() -> int:
    """The largest resident size this process had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == 'darwin' else 1024)
