"""What two ranks do under the hooks; see two_ranks.py."""
import copy
import json
import weakref
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import (
    PowerSGDState,
    powerSGD_hook,
)
from toy import BACKBONE, STAGES, copied_state, toy_config

from rmoe.engine.roles import role_of, trainable_table
from rmoe.engine.wrappers import unwrapped
from rmoe.moe import moe_layers
from rmoe.moe.routers.base import NotFiniteError

SHARDED = dict(type='rmoe.FullySharded')
DDP = dict(type='MMDistributedDataParallel', device_ids=None,
           broadcast_buffers=False)
STAGED = (dict(type='rmoe.ResidualMoEHook', stages=STAGES),
          dict(type='rmoe.MoELossHook'))
# Batch norms are of the core: while it is frozen they use no batch.
STILL = [dict(roles=('head', ), end=2),
         dict(roles=('residual', 'router', 'head'))]


def runner_of(folder, max_iters=6, hooks=STAGED, wrapper=DDP, **options
              ) -> Runner:
    config = toy_config(
        folder, max_iters, copy.deepcopy(hooks), launcher='pytorch',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        model_wrapper_cfg=copy.deepcopy(wrapper), **options)
    config.default_hooks.checkpoint.update(interval=100, save_last=False)
    # Adam makes large steps of what rounding leaves of a zero gradient.
    config.optim_wrapper = dict(optimizer=dict(type='SGD', lr=.1))
    runner = Runner.from_cfg(config)
    # Of equal seeds; a sharded model is initialised before it is sharded.
    runner._init_model_weights = lambda: None
    return runner


def error_of(runner) -> str:
    try:
        runner.train()
    except ValueError as error:
        return f'{type(error).__name__}: {error}'
    return ''


class Wrappers(Hook):
    """Which wrappers there were, and who of them is compiled."""
    priority = 'LOWEST'

    def __init__(self):
        self.compiled, self.seen = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        self.compiled.append('train_step' in vars(runner.model))
        if not self.seen or self.seen[-1]() is not runner.model:
            self.seen.append(weakref.ref(runner.model))


def train_compiled(rank, work_dir, compiled):
    """With and without a compiled step: weights, and what the hook saw."""
    results = {}
    for name in ('plain', 'compiled'):
        runner = runner_of(f'{work_dir}/{name}{rank}',
                           compile=name == 'compiled' and compiled)
        watch = Wrappers()
        runner.register_hook(watch)
        runner.train()
        results[name] = dict(
            state=copied_state(runner.model.module), compiled=watch.compiled,
            alive=[each() is not None for each in watch.seen])
    return results


class Count:
    """A communication hook that counts its calls."""

    def __init__(self):
        self.calls = 0

    def reduce(self, state, bucket):
        self.calls += 1
        return default_hooks.allreduce_hook(state, bucket)


class Calls(Hook):

    def __init__(self, count):
        self.count, self.seen = count, []

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        self.seen.append(self.count.calls)


@MODEL_WRAPPERS.register_module(force=True)
class Compressing(MMDistributedDataParallel):
    """Registers a hook of its own."""
    made = 0

    def __init__(self, module, **options):
        super().__init__(module, **options)
        Compressing.made += 1
        self.register_comm_hook(None, default_hooks.fp16_compress_hook)


def train_with_communication_hooks(rank, work_dir):
    """A hook by hand, one that cannot be moved, one of the wrapper's."""
    count = Count()
    runner = runner_of(f'{work_dir}/hand{rank}')
    runner.model.register_comm_hook(None, count.reduce)
    calls = Calls(count)
    runner.register_hook(calls)
    refused = error_of(runner)
    power = runner_of(f'{work_dir}/power{rank}')
    power.model.register_comm_hook(
        PowerSGDState(None, start_powerSGD_iter=2), powerSGD_hook)
    builtin = runner_of(f'{work_dir}/builtin{rank}')
    builtin.model._register_builtin_comm_hook(
        torch.distributed.BuiltinCommHookType.FP16_COMPRESS)
    own = runner_of(f'{work_dir}/own{rank}',
                    wrapper=dict(DDP, type='Compressing'))
    own.train()
    return dict(calls=calls.seen, refused=refused, power=error_of(power),
                builtin=error_of(builtin), made=Compressing.made,
                own=own.model._get_ddp_logging_data()['comm_hook'])


@MODEL_WRAPPERS.register_module(force=True)
class Renewing(MMDistributedDataParallel):
    """Puts a new norm on the same tensors, as mmengine does for sync_bn,
    which needs a GPU."""

    def __init__(self, module, **options):
        old, new = module.backbone.bn, torch.nn.BatchNorm2d(3)
        for name, value in (*old.named_parameters(), *old.named_buffers()):
            setattr(new, name, value)
        module.backbone.bn = new
        super().__init__(module, **options)


def keep_norms_still(rank, work_dir):
    """Statistics of a frozen core before and after, and whether its norm is
    a new one."""
    runner = runner_of(
        f'{work_dir}/{rank}', max_iters=3, wrapper=dict(DDP, type='Renewing'),
        hooks=(dict(type='rmoe.ResidualMoEHook', stages=[
            dict(roles=('residual', 'router', 'head'))]), ))
    norm = unwrapped(runner.model).backbone.bn
    before = copied_state(norm)
    runner.train()
    after = unwrapped(runner.model).backbone.bn
    return dict(new=after is not norm, before=before,
                after=copied_state(after))


def refuse(rank, work_dir):
    """What is said of wrappers and groups before training."""
    def message(name, hooks=STAGED, **options):
        return error_of(runner_of(f'{work_dir}/{name}{rank}', hooks=hooks,
                                  **options))

    broadcasting = dict(DDP, broadcast_buffers=True)
    backbone = copy.deepcopy(BACKBONE)
    backbone['moe']['router'].update(capacity_factor=1., group=2)
    odd = runner_of(f'{work_dir}/odd{rank}', backbone=backbone)
    odd._train_dataloader.update(
        dataset=dict(type='ToyImages', size=9), batch_size=2,
        sampler=dict(type='DefaultSampler', round_up=False))
    return dict(
        separate=message('separate', wrapper=dict(
            type='MMSeparateDistributedDataParallel', device_ids=None)),
        **{hook: message(hook, [dict(type=f'rmoe.{hook}')],
                         wrapper=broadcasting)
           for hook in ('MoELossHook', 'RoutingStatsHook')},
        odd=error_of(odd))


class Poison(Hook):
    """A token that is nan, on one rank in one iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train(self, runner):
        *_, layer = moe_layers(unwrapped(runner.model)).values()
        layer.register_forward_pre_hook(self.poison)
        self.runner = runner

    def poison(self, layer, args):
        if self.runner.iter == self.iteration:
            x = args[0].clone()
            x[0, 0] = float('nan')
            return (x, *args[1:])


def meet_nan(rank, work_dir):
    """On rank 1 alone: what each says, and when."""
    runner = runner_of(f'{work_dir}/{rank}', hooks=STAGED[1:])
    if rank == 1:
        runner.register_hook(Poison(2))
    try:
        runner.train()
    except NotFiniteError as error:
        return str(error), runner.iter


def train_in_windows(rank, work_dir, ranks, options):
    """EMA, accumulated gradients and clipping, in stages; on two ranks with
    half the batch each, or on one with all of it."""
    config = toy_config(
        f'{work_dir}/{ranks}-{rank}', 6, [
            dict(type='rmoe.ResidualMoEHook', stages=STILL), STAGED[1],
            dict(type='EMAHook', momentum=.25)], **copy.deepcopy(options))
    config.train_dataloader.batch_size = 4 // ranks
    config.optim_wrapper = dict(
        optimizer=dict(type='SGD', lr=.5), accumulative_counts=2,
        clip_grad=dict(max_norm=.05))
    config.default_hooks.checkpoint.update(interval=100, save_last=False)
    if ranks > 1:
        config.update(launcher='pytorch', model_wrapper_cfg=DDP,
                      env_cfg=dict(dist_cfg=dict(backend='gloo')))
    runner = Runner.from_cfg(config)
    runner._init_model_weights = lambda: None
    runner.train()
    average = next(hook for hook in runner.hooks
                   if type(hook).__name__ == 'EMAHook').ema_model.module
    return dict(model=copied_state(unwrapped(runner.model)),
                average=copied_state(average))


class Shards(Hook):
    """Roles whose shards an iteration changes on this rank."""
    priority = 'LOWEST'

    def __init__(self):
        self.changed = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.before = local_parameters(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        now = local_parameters(runner)
        self.changed.append({
            role_of(name) for name, value in self.before.items()
            if not torch.equal(value, now[name])})


def local_parameters(runner) -> dict:
    return {name: getattr(p, '_local_tensor', p).detach().clone()
            for name, p in unwrapped(runner.model).named_parameters()}


def train_sharded(rank, work_dir):
    """Through all stages under fully_shard and under DDP, with every hook."""
    results = {}
    for name, wrapper, cost in (
            ('sharded', SHARDED, True), ('ddp', DDP, True),
            ('uncounted', SHARDED, False)):
        folder = Path(f'{work_dir}/{name}{rank}')
        # From one file: FullySharded initialises weights when it wraps.
        runner = runner_of(folder, wrapper=wrapper, load_from=f'{work_dir}/'
                           'start.pth', hooks=(
            *STAGED, dict(type='rmoe.RoutingStatsHook', interval=2),
            *([dict(type='rmoe.CostHook')] if cost else [])))
        shards, model = Shards(), runner.model
        runner.register_hook(shards)
        runner.train()
        assert (runner.model is model) == (name != 'ddp')
        cost = folder / 'cost.json'
        results[name] = dict(
            changed=shards.changed,
            table=trainable_table(runner.model),
            sizes={key: p.numel() for key, p in local_parameters(
                runner).items()},
            state={key: p.full_tensor() if hasattr(p, 'full_tensor') else
                   p.detach() for key, p in unwrapped(
                       runner.model).named_parameters()},
            entropy=runner.message_hub.get_scalar(
                'train/moe_entropy').current(),
            cost=json.loads(cost.read_text()) if cost.exists() else None)
    return results
