"""Trainings of a toy segmentor whose parameters lie on several ranks."""
import copy

import mmengine.config.config
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import Runner
from toy import BACKBONE, toy_config

from rmoe.parallel.layout import layout_of, whole

# Without batch norm, which sees only the images of its rank.
PLAIN = dict(copy.deepcopy(BACKBONE), type='rmoe.SwinMoE')
PLAIN['moe']['router']['loss_weights'] = {}
EMA = dict(type='EMAHook', momentum=0.25)


@METRICS.register_module(force=True)
class MeanOfLogits(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results += [float(sample.mean()) for sample in data_samples]

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))


class Draws(Hook):
    """What a rank draws before each iteration, and what was validated."""
    priority = 'LOWEST'

    def __init__(self):
        self.values, self.validated = [], []

    def after_val_epoch(self, runner, metrics=None):
        self.validated.append(metrics['toy/mean'])

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.values.append(float(torch.rand(())))


def sharded_runner(folder, max_iters=4, interval=2, layout=None, hooks=(),
                   validate=False, checkpoint=None, world=1, num_experts=4,
                   **options) -> Runner:
    """A training on batches of four images, on however many ranks.

    Args:
        layout: options of FullySharded; None for a plain model.
        checkpoint: options of the CheckpointHook.
    """
    backbone = copy.deepcopy(PLAIN)
    backbone['moe']['num_experts'] = num_experts
    if layout is not None:
        options.update(
            launcher='pytorch', model_wrapper_cfg=dict(
                type='rmoe.FullySharded', **layout))
    if validate:
        options.update(
            val_cfg=dict(type='ValLoop'),
            val_dataloader=dict(
                dataset=dict(type='ToyImages', size=4), batch_size=2,
                num_workers=0, collate_fn=dict(type='default_collate'),
                sampler=dict(type='DefaultSampler', shuffle=False)),
            val_evaluator=dict(type='MeanOfLogits'))
    config = toy_config(folder, max_iters, copy.deepcopy(hooks), backbone,
                        **options)
    if validate:
        config.train_cfg.val_interval = 2
    config.train_dataloader.batch_size = 4 // world
    # A gradient that is zero but for rounding, as that of a key's bias, moves
    # nothing.
    config.optim_wrapper.optimizer.eps = 1e-3
    config.default_hooks.checkpoint.update(interval=interval,
                                           **(checkpoint or {}))
    return Runner.from_cfg(config)


def run_jobs(rank, work_dir, jobs):
    """Trainings one after the other.

    Args:
        jobs: options of :func:`sharded_runner` with a name each.

    Returns:
        By name, what the rank drew, the weights and what was raised.
    """
    world = (torch.distributed.get_world_size()
             if torch.distributed.is_initialized() else 1)
    # As conftest.py does in its own process: laying out configs is slow.
    mmengine.config.config.FormatCode = lambda text, **_: (text, False)
    results = {}
    for job in jobs:
        job = dict(job)
        name = job.pop('name')
        torch.manual_seed(0)
        runner = sharded_runner(f'{work_dir}/{name}', world=world, **job)
        draws = Draws()
        runner.register_hook(draws)
        error = ''
        try:
            runner.train()
        except ValueError as caught:
            error = str(caught)
        model = getattr(runner.model, 'module', runner.model)
        results[name] = dict(
            draws=draws.values, validated=draws.validated, error=error,
            weights={
                key: whole(value) if layout_of(value) else value.clone()
                for key, value in model.state_dict().items()})
    return results
