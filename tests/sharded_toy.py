"""Trainings of a toy segmentor whose parameters lie on several ranks."""
import copy

import mmengine.config.config
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import METRICS, MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import nn
from toy import BACKBONE, toy_config

from rmoe.moe import moe_layers
from rmoe.parallel.copies import allow_copies, reshard
from rmoe.parallel.layout import layout_of, whole
from rmoe.parallel.state import accept_full_tensors

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


@MODEL_WRAPPERS.register_module(force=True)
class ToySharded(nn.Module):
    """Sharded by fully_shard; experts over ranks too, their weights being
    gathered to compute."""

    def __init__(self, module, replicate=1, expert_parallel=1):
        super().__init__()
        self.module = spread(module, replicate, expert_parallel)

    def train_step(self, data, optim_wrapper):
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data):
        result = self.module.val_step(data)
        reshard(self.module)
        return result

    test_step = val_step


def spread(module, replicate=1, expert_parallel=1):
    """Shard a segmentor over all ranks."""
    from torch.distributed.fsdp import fully_shard
    world = torch.distributed.get_world_size()
    mesh = _mesh((replicate, world // replicate), ('replicate', 'shard'))
    if expert_parallel > 1:
        _spread_experts(module, replicate, expert_parallel)
    fully_shard(module.head, mesh=mesh)
    fully_shard(module, mesh=mesh)
    accept_full_tensors(module)
    allow_copies(module)
    return module


def _mesh(shape, names):
    from torch.distributed.device_mesh import init_device_mesh
    return init_device_mesh('cpu', shape, mesh_dim_names=names)


def _spread_experts(module, replicate, expert_parallel):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    world = torch.distributed.get_world_size()
    mesh = _mesh((replicate, world // replicate // expert_parallel,
                  expert_parallel), ('replicate', 'shard', 'expert'))
    for layer in moe_layers(module).values():
        experts = layer.experts
        for name, parameter in experts.named_parameters():
            experts.register_parameter(name, nn.Parameter(distribute_tensor(
                parameter.detach(), mesh['expert'], [Shard(0)])))
        _gather_to_compute(experts, expert_parallel)
        fully_shard(experts, mesh=mesh['replicate', 'shard'],
                    shard_placement_fn=lambda parameter: Shard(1))


def _gather_to_compute(experts, expert_parallel):
    from torch.distributed.tensor import Partial
    forward = experts.forward

    def gathering(*arguments, **options):
        whole_ones = {
            name: parameter.full_tensor(grad_placements=[Partial()])
            for name, parameter in experts.named_parameters()}
        for value in whole_ones.values():
            if value.requires_grad:
                # The mean over ranks, as of everything else.
                value.register_hook(lambda grad: grad / expert_parallel)
        vars(experts).update(whole_ones)
        try:
            return forward(*arguments, **options)
        finally:
            for name in whole_ones:
                del vars(experts)[name]

    experts.forward = gathering


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
        layout: options of ToySharded; None for a plain model.
        checkpoint: options of the CheckpointHook.
    """
    backbone = copy.deepcopy(PLAIN)
    backbone['moe']['num_experts'] = num_experts
    if layout is not None:
        options.update(
            launcher='pytorch', model_wrapper_cfg=dict(
                type='ToySharded', **layout))
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
    # Of tensors on different meshes torch makes no common step. A gradient
    # that is zero but for rounding, as that of a key's bias, moves nothing.
    config.optim_wrapper.optimizer.update(foreach=False, eps=1e-3)
    config.default_hooks.checkpoint.update(interval=interval,
                                           **(checkpoint or {}))
    runner = Runner.from_cfg(config)
    if layout is not None:
        runner._init_model_weights = lambda: None
    return runner


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
