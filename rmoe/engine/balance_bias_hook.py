"""Balances the load of experts without an auxiliary loss (2408.15664).

The router has one bias per expert, which is added to the scores when experts
are chosen. The hook raises it for experts with little load and lowers it for
those with much.
"""
import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from rmoe.engine.wrappers import check_buffers
from rmoe.moe import BiasBalancedRouter
from rmoe.registry import HOOKS


@HOOKS.register_module()
class BalanceBiasHook(Hook):
    """Updates the bias of every ``BiasBalancedRouter`` once per optimizer
    step, from the loads of all ranks and all accumulated batches.

    A router that is frozen, or that routed nothing, keeps its bias.
    """

    def before_train(self, runner: Runner) -> None:
        if not _routers(runner.model):
            raise ValueError(
                'BalanceBiasHook found no BiasBalancedRouter in the model: '
                "set moe.router=dict(type='BiasBalancedRouter'), or remove "
                'the hook')
        check_buffers(runner.model)

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: object = None,
                         outputs: dict | None = None) -> None:
        # This is True right after a step of the optimizer, also with gradient
        # accumulation (accumulative_counts > 1).
        if runner.optim_wrapper.should_update():
            update_biases(runner.model)


def update_biases(model: nn.Module) -> None:
    """Update the bias of every trainable router. All ranks must call this."""
    routers = _routers(model)
    # The loads of all layers are summed over ranks in one reduction.
    flat = torch.cat([router.recent_load_E for router in routers])
    all_reduce(flat)
    loads = flat.split([router.num_experts for router in routers])
    for router, load_E in zip(routers, loads):
        trains = any(p.requires_grad for p in router.parameters())
        if trains and bool(load_E.any()):
            router.update_bias(load_E)
        router.count_anew()


def _routers(model: nn.Module) -> list[BiasBalancedRouter]:
    return [module for module in model.modules()
            if isinstance(module, BiasBalancedRouter)]
