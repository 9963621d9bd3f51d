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
    """Base class of the hooks in this file. It checks that the model has
    suitable experts, and calls :meth:`after_step` after each optimizer step.

    Attributes:
        needs_core: whether the hook works on residuals, which only experts
            with a core have.
        needs_full_rank: whether the hook takes means of weights, which
            low-rank residuals do not have.
    """
    needs_core = False
    needs_full_rank = True

    def before_train(self, runner: Runner) -> None:
        kind = type(self).__name__
        layers = moe_layers(unwrapped(runner.model))
        if not layers:
            raise ValueError(f'{kind} found no MoE layer in the model: give '
                             'the backbone a moe=dict(layers=...), or remove '
                             'the hook')
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
        # This is True right after a step of the optimizer, also with gradient
        # accumulation (accumulative_counts > 1).
        if runner.optim_wrapper.should_update():
            self.after_step(runner)

    def after_step(self, runner: Runner) -> None:
        """Called after each step of the optimizer."""
        raise NotImplementedError


@HOOKS.register_module()
class ZeroMeanHook(ExpertMeanHook):
    """Keeps the mean of a layer's residuals at zero.

    The weights of an expert are core + residual, and Adam moves each of the
    two by about the learning rate. So the part that all experts have in
    common moves twice per step. With this hook only the core moves it, as in
    a dense model, and residuals hold only the differences between experts. A
    single expert then trains like the dense model.

    Raises:
        ValueError: (before training) for a model without MoE layers, and for
            experts without a core, with low rank, or spread over processes.
    """
    needs_core = True

    def after_step(self, runner: Runner) -> None:
        subtract_means(runner.model)


@HOOKS.register_module()
class ExpertAveragingHook(ExpertMeanHook):
    """Pulls the experts of a layer towards their mean.

    After each optimizer step every expert is moved a part of the way to the
    mean of all experts (Experts Weights Averaging, 2308.06093). This share of
    the way changes linearly over the training. Experts that end close to
    their mean can be merged into one dense FFN with little loss:
    ``tools/upcycle.py --to-dense mean``.

    Args:
        first: share of the way at the first step, 0 to 1.
        last: share at the last step.

    Raises:
        ValueError: for a share out of range; (before training) for a model
            without MoE layers, for low-rank residuals, or for experts that
            are spread over processes.
    """

    def __init__(self, first: float = 0.1, last: float = 0.) -> None:
        for name, share in (('first', first), ('last', last)):
            if not 0 <= share <= 1:
                raise ValueError(f'{name}={share} must lie between 0 and 1')
        self.first, self.last = first, last

    def after_step(self, runner: Runner) -> None:
        done = runner.iter / max(1, runner.max_iters - 1)
        pull_to_means(runner.model,
                      self.first + (self.last - self.first) * done)


@HOOKS.register_module()
class SharedMomentsHook(ExpertMeanHook):
    """Gives all experts of a layer the same second moment, the mean of theirs.

    Adam divides the gradient of each expert by the root of its own second
    moment. So an expert that gets few tokens takes steps as large as one that
    gets many, although the gradient of few tokens has more noise. With one
    second moment for all, an expert with a smaller gradient than the others
    takes a smaller step.

    Raises:
        ValueError: (before training) for a model without MoE layers or for
            experts that are spread over processes; (after the first step) for
            an optimizer that keeps no second moment.
    """
    needs_full_rank = False

    def after_step(self, runner: Runner) -> None:
        share_moments(runner.model, runner.optim_wrapper.optimizer)


@torch.no_grad()
def share_moments(model: nn.Module, optimizer: Optimizer) -> None:
    """Set the second moment of every expert to the mean over experts.

    Raises:
        ValueError: for an optimizer that keeps no second moment.
    """
    for parameter in _trained(model):
        # A parameter that has not had a gradient yet, as when a stage has
        # just begun, has no optimizer state.
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
    """Subtract the mean over experts from every residual, both weights and
    biases."""
    for parameter in _trained(model):
        parameter.sub_(parameter.mean(0, keepdim=True))


@torch.no_grad()
def pull_to_means(model: nn.Module, share: float) -> None:
    """Move every expert a share of the way, 0 to 1, to the mean of all."""
    for parameter in _trained(model):
        parameter.lerp_(parameter.mean(0, keepdim=True), share)


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters (E, ...) of experts that train. Frozen ones are left
    out, so that they do not change."""
    for layer in moe_layers(model).values():
        for parameter in layer.experts.parameters():
            if parameter.requires_grad:
                yield parameter
