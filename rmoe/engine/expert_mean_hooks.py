"""Hooks that act on the mean over a layer's experts, after each optimizer
step."""
from collections.abc import Iterator

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer

from rmoe.engine.wrappers import unwrapped
from rmoe.moe import moe_layers
from rmoe.parallel.layout import is_laid_out
from rmoe.registry import HOOKS


class ExpertMeanHook(Hook):
    """What the hooks of this file share: when they act, and on what.

    Attributes:
        needs_core: whether it is about residuals.
        needs_full_rank: whether it takes means of weights.
    """
    needs_core = False
    needs_full_rank = True

    def before_train(self, runner: Runner) -> None:
        kind = type(self).__name__
        layers = moe_layers(unwrapped(runner.model))
        if not layers:
            raise ValueError(f'{kind} found no MoE layer in the model: '
                             'give it some, or remove the hook')
        for name, layer in layers.items():
            experts = layer.experts
            if self.needs_core and not experts.core:
                raise ValueError(f'{kind}: {name} has core=False; it needs '
                                 'core=True, so that experts are residuals')
            if self.needs_full_rank and experts.rank is not None:
                raise ValueError(
                    f'{kind}: {name} has rank={experts.rank}; it needs rank='
                    'None, since low-rank residuals have no mean of that rank')
            if is_laid_out(experts):
                raise ValueError(
                    f'{kind}: the experts of {name} are spread over '
                    'processes. Use DistributedDataParallel, or remove the '
                    'hook')

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: object = None,
                         outputs: dict | None = None) -> None:
        # True right after a step, whatever accumulative_counts is.
        if runner.optim_wrapper.should_update():
            self.after_step(runner)

    def after_step(self, runner: Runner) -> None:
        """Called after each step of the optimizer."""
        raise NotImplementedError


@HOOKS.register_module()
class ZeroMeanHook(ExpertMeanHook):
    """Keeps the mean of a layer's residuals at zero.

    An expert is core + residual, and Adam moves each of the two by about the
    learning rate: what all experts have in common moves twice. With this
    hook the core alone moves it, as in a dense model, and residuals hold what
    experts do not share. A single expert then is the dense model.

    Raises:
        ValueError: (before training) without MoE layers, for experts without
            a core, of low rank, or spread over processes.
    """
    needs_core = True

    def after_step(self, runner: Runner) -> None:
        subtract_means(runner.model)


@HOOKS.register_module()
class ExpertAveragingHook(ExpertMeanHook):
    """Pulls the experts of a layer to their mean.

    After each optimizer step every expert moves by a share of the way to the
    mean of all (Experts Weights Averaging, 2308.06093). The share changes
    linearly over the training. Experts that end close to their mean can be
    made one dense FFN at little loss: ``tools/upcycle.py --to-dense mean``.

    Args:
        first: share of the way at the first step, 0 to 1.
        last: share at the last step.

    Raises:
        ValueError: for a share out of range; (before training) without MoE
            layers, for residuals of low rank, or experts that are spread over
            processes.
    """

    def __init__(self, first: float = 0.1, last: float = 0.) -> None:
        for name, share in (('first', first), ('last', last)):
            if not 0 <= share <= 1:
                raise ValueError(f'{name}={share} must lie between 0 and 1')
        self.first, self.last = first, last

    def after_step(self, runner: Runner) -> None:
        done = runner.iter / max(1, runner.max_iters - 1)
        pull_to_means(runner.model,
                      self.first + (self.last - self.first) * min(done, 1.))


@HOOKS.register_module()
class SharedMomentsHook(ExpertMeanHook):
    """Gives the experts of a layer one second moment, the mean of theirs.

    Adam divides each expert's gradient by the root of its own second moment.
    An expert that gets few tokens so takes steps as large as one that gets
    many, and all the noise of its few tokens with them. With one second
    moment for all, an expert's step is as large as its gradient is beside
    those of the others.

    Raises:
        ValueError: (before training) without MoE layers or for experts that
            are spread over processes; (after the first step) for an optimizer
            that keeps no second moment.
    """
    needs_full_rank = False

    def after_step(self, runner: Runner) -> None:
        share_moments(runner.model, runner.optim_wrapper.optimizer)


@torch.no_grad()
def share_moments(model: nn.Module, optimizer: Optimizer) -> None:
    """Set the second moment of every expert to the mean over experts.

    Raises:
        ValueError: for an optimizer that keeps none.
    """
    for parameter in _trained(model):
        # Without a gradient (a stage began) there is no state yet.
        state = optimizer.state.get(parameter)
        if not state:
            continue
        if 'exp_avg_sq' not in state:
            raise ValueError(
                f'SharedMomentsHook: {type(optimizer).__name__} keeps no '
                f'second moment (exp_avg_sq) but {", ".join(state)}. Use '
                'AdamW, or remove the hook')
        moment = state['exp_avg_sq']
        moment.copy_(moment.mean(0, keepdim=True).expand_as(moment))


@torch.no_grad()
def subtract_means(model: nn.Module) -> None:
    """Take the mean over experts out of every residual, weights and biases."""
    for parameter in _trained(model):
        parameter.sub_(parameter.mean(0, keepdim=True))


@torch.no_grad()
def pull_to_means(model: nn.Module, share: float) -> None:
    """Move every expert a share of the way, 0 to 1, to the mean of all."""
    for parameter in _trained(model):
        parameter.lerp_(parameter.mean(0, keepdim=True), share)


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """(E, ...) parameters of experts; what does not train stays as it is."""
    for layer in moe_layers(model).values():
        for parameter in layer.experts.parameters():
            if parameter.requires_grad:
                yield parameter
