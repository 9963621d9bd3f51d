"""Balance without an auxiliary loss (2408.15664): the step of the bias."""
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
        # True right after a step, whatever accumulative_counts is.
        if runner.optim_wrapper.should_update():
            update_biases(runner.model)


def update_biases(model: nn.Module) -> None:
    """One step of every trainable router's bias; a collective operation."""
    routers = _routers(model)
    # One reduction of one flat tensor serves all layers.
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
