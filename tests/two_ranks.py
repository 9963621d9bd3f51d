"""Run a function on two or more gloo ranks, each its own process."""
import os
import socket
import sys
from multiprocessing import forkserver
from types import SimpleNamespace

import torch
from mmengine.hooks import Hook
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from toy import STAGES, ToyImages, copied_state, toy_model, toy_runner

from rmoe.anywhere.statistics import _take_counts
from rmoe.engine.balance_bias_hook import update_biases
from rmoe.engine.moe_loss_hook import _check_finite, install
from rmoe.engine.roles import role_of
from rmoe.moe import BiasBalancedRouter, moe_layers
from rmoe.moe.routers.base import NotFiniteError

# rmoe first: mmcv may have no operators of its own.
PRELOADED = ['rmoe', 'mmengine.runner', 'rmoe.backbones', 'rmoe.engine',
             'mmseg.models', 'mmseg.visualization', 'mmdet.models',
             'rmoe.parallel', 'rmoe.parallel.sharding']


def run_two_ranks(function, work_dir: str, *args) -> list:
    """What function(rank, work_dir, *args) returned on each rank."""
    return run_ranks(2, function, work_dir, *args)


def run_ranks(world: int, function, work_dir: str, *args) -> list:
    """The same on so many ranks."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    # One process imports what takes long, once; ranks are copies of it.
    forkserver.set_forkserver_preload(PRELOADED)
    start_processes(_run, (world, function, port, work_dir, args),
                    nprocs=world, start_method='forkserver')
    return [torch.load(f'{work_dir}/rank{rank}.pth', weights_only=False)
            for rank in range(world)]


def _run(rank, world, function, port, work_dir, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # mmengine's own set-up asks for a GPU.
    torch.distributed.init_process_group('gloo')
    torch.save(function(rank, work_dir, *args), f'{work_dir}/rank{rank}.pth')
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # A normal exit destroys gloo's threads in any order, and at times aborts
    # with "terminate called without an active exception".
    os._exit(0)


def train(rank, work_dir, collapsed):
    """Seven iterations through all stages."""
    runner = toy_runner(
        f'{work_dir}/{rank}', max_iters=7, hooks=(
            dict(type='rmoe.ResidualMoEHook', stages=STAGES),
            dict(type='rmoe.MoELossHook'),
            dict(type='rmoe.RoutingStatsHook', interval=2)),
        launcher='pytorch',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel', device_ids=None,
            broadcast_buffers=False))
    if collapsed:
        for layer in moe_layers(runner.model).values():
            torch.nn.init.zeros_(layer.router.scorer.weight)
            layer.router.scorer.weight.register_hook(torch.zeros_like)
    watch = Watch()
    runner.register_hook(watch, priority='LOWEST')
    runner._init_model_weights = lambda: None
    runner.train()
    return dict(state=copied_state(runner.model.module),
                changed=watch.changed)


def train_bias(rank, work_dir, backbone, hook):
    """One iteration of bias balancing: loads of this rank and the biases;
    and a step of a router whose ranks disagree."""
    runner = toy_runner(
        f'{work_dir}/{rank}', max_iters=1, hooks=(hook, ), backbone=backbone,
        launcher='pytorch', env_cfg=dict(dist_cfg=dict(backend='gloo')),
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel', device_ids=None,
            broadcast_buffers=False))
    runner.train()
    layers = moe_layers(runner.model.module)
    loads = {name: layer.demand_E.tolist() for name, layer in layers.items()}
    router = BiasBalancedRouter(4, 3, update_rate=1.)
    router.recent_load_E += torch.tensor([[6, 0, 3], [0, 9, 3]][rank])
    update_biases(router)
    layer = next(iter(layers.values()))
    layer.demand_E.copy_(torch.arange(4) + 10 * rank)
    layer.token_counts.copy_(torch.tensor([50, 5 + rank]))
    demand_E, _, tokens = _take_counts({'a': layer})['a']
    return dict(
        counted=(demand_E.tolist(), tokens.tolist(),
                 layer.demand_E.tolist()),
        opposed=router.balance_bias.tolist(),
        loads=loads,
        bias={name: layer.router.balance_bias
              for name, layer in layers.items()})


def train_every_router(rank, work_dir, routers):
    """Two DDP steps with each router; rank 1 gets hardly any variety."""
    images = ToyImages()
    states = {}
    for name, router in routers.items():
        torch.manual_seed(0)
        model = toy_model(router=router)
        # No find_unused_parameters: an expert without tokens must not matter.
        parallel = torch.nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(2):
            picked = [2 * step, 2 * step + 1] if rank == 0 else [9, 9]
            losses = parallel(
                torch.stack([images[i]['inputs'] for i in picked]),
                torch.stack([images[i]['labels'] for i in picked]),
                mode='loss')
            optimizer.zero_grad()
            losses['loss_ce'].backward()
            optimizer.step()
        states[name] = {key: value.detach().clone()
                        for key, value in model.named_parameters()}
    return states


class Watch(Hook):
    """Which roles an iteration changes, and whether MoE layers route."""

    def __init__(self):
        self.changed, self.routed, self.trainable = {}, {}, {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.before = copied_state(runner.model)
        self.demand = self._demand(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        now = runner.model.state_dict()
        self.changed[batch_idx] = {
            role_of(key) for key, value in self.before.items()
            if not torch.equal(value, now[key])}
        self.routed[batch_idx] = self._demand(runner) > self.demand

    def _demand(self, runner):
        return sum(int(layer.demand_E.sum())
                   for layer in moe_layers(runner.model).values())


def who_stops(rank, work_dir):
    """What each rank says of a nan that one of them met."""
    layer = toy_model()
    if rank == 1:
        list(moe_layers(layer).values())[1].router.not_finite += 3
    try:
        _check_finite(SimpleNamespace(model=layer))
    except NotFiniteError as error:
        return str(error)


def aux_gradient(rank, work_dir, state):
    """Gradient of the auxiliary losses through DDP, on one batch."""
    model = toy_model()
    model.load_state_dict(state)
    install(model)
    images = ToyImages()
    inputs = torch.stack([images[i]['inputs'] for i in range(4)])
    labels = torch.stack([images[i]['labels'] for i in range(4)])
    parallel = torch.nn.parallel.DistributedDataParallel(
        model, broadcast_buffers=False)
    losses = parallel(inputs, labels, mode='loss')
    (losses['loss_moe_importance'] + 0 * losses['loss_ce']).backward()
    return torch.stack([layer.router.scorer.weight.grad
                        for layer in moe_layers(model).values()])


class Sent(TorchDispatchMode):
    """Bytes that a process sends in collectives, as a ring does; of rows,
    what stays in the process included."""

    def __init__(self):
        super().__init__()
        self.parameters = self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name.startswith('c10d._allgather_base_'):
            self.parameters += _share(args) * args[0].nbytes
        elif name.startswith('c10d._reduce_scatter_base_'):
            self.parameters += _share(args) * args[1].nbytes
        elif name.startswith('c10d.allreduce_'):
            self.parameters += 2 * _share(args) * sum(
                one.nbytes for one in args[0])
        elif name.startswith('c10d.alltoall_base_'):
            self.rows += args[1].nbytes  # counts
        elif name == '_c10d_functional.all_to_all_single':
            self.rows += args[0].nbytes
        return func(*args, **(kwargs or {}))


def _share(args):
    """(W - 1) / W of the group that is among the arguments."""
    group = next(one for one in args if isinstance(one, torch.ScriptObject))
    size = torch.distributed.ProcessGroup.unbox(group).size()
    return (size - 1) / size


def held_and_sent(rank, work_dir, wrappers):
    """Of a step in each layout: bytes of weights, gradients and moments that
    this rank has, and what it sent."""
    from rmoe.parallel import FullySharded
    images = ToyImages()
    batch = [torch.stack([images[i][key] for i in range(4)])
             for key in ('inputs', 'labels')]
    found = {}
    for name, options in wrappers.items():
        torch.manual_seed(0)
        model = FullySharded(toy_model().train(), **options)
        optimizer = torch.optim.AdamW(model.parameters())
        with Sent() as sent:
            model(*batch, mode='loss')['loss_ce'].backward()
        optimizer.step()
        found[name] = dict(
            weights=_local_bytes(model.parameters()),
            gradients=_local_bytes(one.grad for one in model.parameters()
                                   if one.grad is not None),
            moments=_local_bytes(value for state in optimizer.state.values()
                                 for value in state.values() if value.dim()),
            parameters=sent.parameters, rows=sent.rows)
    return found


def _local_bytes(tensors):
    """Of DTensors, what this rank has."""
    return sum(getattr(one, '_local_tensor', one).nbytes for one in tensors)
