"""Residuals that only tell experts apart."""
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from rmoe.engine.wrappers import unwrapped
from rmoe.moe import moe_layers
from rmoe.parallel.layout import is_laid_out
from rmoe.registry import HOOKS


@HOOKS.register_module()
class ZeroMeanHook(Hook):
    """Keeps the mean of a layer's residuals at zero, after each optimizer
    step.

    An expert is core + residual, and Adam moves each of the two by about the
    learning rate: what all experts have in common moves twice. With this
    hook the core alone moves it, as in a dense model, and residuals hold what
    experts do not share. A single expert then is the dense model.

    Raises:
        ValueError: (before training) without MoE layers, for experts without
            a core, of low rank, or spread over processes.
    """

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        layers = moe_layers(model)
        if not layers:
            raise ValueError('ZeroMeanHook found no MoE layer in the model: '
                             'give it some, or remove the hook')
        for name, layer in layers.items():
            experts = layer.experts
            if not experts.core or experts.rank is not None:
                raise ValueError(
                    f'ZeroMeanHook: {name} has core={experts.core} and rank='
                    f'{experts.rank}; it needs core=True and rank=None, so '
                    'that residuals have a mean')
            if is_laid_out(experts):
                raise ValueError(
                    f'ZeroMeanHook: the experts of {name} are spread over '
                    'processes. Use DistributedDataParallel, or remove the '
                    'hook')

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: object = None,
                         outputs: dict | None = None) -> None:
        # True right after a step, whatever accumulative_counts is.
        if runner.optim_wrapper.should_update():
            subtract_means(runner.model)


@torch.no_grad()
def subtract_means(model: nn.Module) -> None:
    """Take the mean over experts out of every residual, weights and biases.

    A parameter that does not train stays as it is.
    """
    for layer in moe_layers(model).values():
        for parameter in layer.experts.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.mean(0, keepdim=True))
