"""What a training run costs, in a file that runs can be compared by."""
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

# The attention kernel of the CPU, which torch's counter does not know. To
# force another kernel while counting would change what is trained.
ATTENTION: dict[Any, Callable[..., int]] = dict(zip(compat.cpu_attention, (
    lambda query, key, value, *_, **__:
        sdpa_flop_count(query, key, value),
    lambda grad, query, key, value, *_, **__:
        sdpa_backward_flop_count(grad, query, key, value))))


@HOOKS.register_module()
class CostHook(Hook):
    """Writes what training costs to ``cost.json`` in the work dir, at every
    checkpoint and at the end.

    - ``seconds``: of training iterations, loading of data included (but for
      the batch after a checkpoint); ``device_seconds``: times ranks;
      ``wall_seconds``: with validation and saving.
    - ``samples``: images of all ranks; ``iterations``: forward and backward
      passes, of which gradient accumulation makes one step out of several.
    - ``flops``: operations of all ranks (a multiply-add is two), forward and
      backward as they are executed: what is frozen saves its backward, what
      activation checkpointing recomputes counts again. torch's counter looks
      at the first iteration of each stage, whose operations per image stand
      for the stage; it knows matrix products, convolutions and attention, and
      no compiled operator of mmcv.
    - ``peak_memory``: bytes; of a GPU what tensors had, of a CPU the
      process's largest resident size. Of the first rank.
    - ``stages``: the same for each set of what trains.

    A checkpoint keeps the cost of its run, and a resumed run adds to it.
    """
    # After ResidualMoEHook, before LoggerHook resets CUDA's peak.
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
                'the checkpoint says nothing of its cost: cost.json counts '
                f'from iteration {runner.iter} on')
            self._saved = dict(from_iteration=runner.iter)
        model = runner.model
        self._parameters = list(model.parameters())
        self._layers = list(moe_layers(model).values())
        self.stages = {key: dict(stage) for key, stage in
                       self._saved.get('stages', {}).items()}
        self._began = time.perf_counter()
        # An iteration-based loop first reads what it has trained on.
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
        """Names what trains, the same in a resumed run."""
        bits = bytes(p.requires_grad for p in self._parameters) + bytes(
            layer.core_only for layer in self._layers)
        return hashlib.sha256(bits).hexdigest()[:12]

    def _write(self, runner: Runner) -> dict[str, Any]:
        cost = self.summary()
        write_atomically(os.path.join(runner.work_dir, 'cost.json'),
                         json.dumps(cost, indent=1).encode())
        return cost

    def summary(self) -> dict[str, Any]:
        """The cost so far, as in the file."""
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
    """A stopwatch that can be started and stopped twice.

    Attributes:
        seconds: that it ran, as of the last stop.
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
        if of_instance:  # a compiled one
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
    """Images in a batch of one rank."""
    if isinstance(batch, dict) and 'inputs' in batch:
        inputs = batch['inputs']
        # Semi-supervised: by branch.
        return (sum(map(len, inputs.values())) if isinstance(inputs, dict)
                else len(inputs))
    loader = runner.train_dataloader
    return loader.batch_size or loader.batch_sampler.batch_size


def _resident() -> int:
    """The largest resident size this process had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == 'darwin' else 1024)
