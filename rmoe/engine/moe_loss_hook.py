"""Adds the auxiliary losses of MoE layers to the losses of any segmentor or
detector, and makes the checks that a model with MoE layers needs."""
from typing import Any

import torch
from mmengine.dist import all_gather, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from rmoe.backbones.padding import install_padding
from rmoe.engine.group_check import check_groups
from rmoe.engine.wrappers import check_buffers, check_saving, unwrapped
from rmoe.moe import collect_losses, moe_layers
from rmoe.moe.finite import raise_not_finite, take_not_finite
from rmoe.registry import HOOKS


@HOOKS.register_module()
class MoELossHook(Hook):
    """Adds ``loss_moe_*`` to the loss dict of the model.

    A pair of forward hooks on the model collects the auxiliary losses that
    its MoE layers produce while it computes losses. They go through the same
    sum, loss scale and gradient accumulation as every other loss, and appear
    in the log.

    The hook also makes the model tell its MoE backbones which tokens are
    padding. And it checks whether routers met nan or inf. On an accelerator
    it does this only every ``interval`` iterations, because the host has to
    wait for the device each time.

    Args:
        interval: number of iterations between two such checks. At a check all
            ranks wait for each other.

    Raises:
        NotFiniteError: if a router met nan or inf; names the layer. It is
            raised on all ranks, at most ``interval`` iterations late. Several
            ranks on CPUs check after every iteration, and a single process on
            a CPU raises in the layer itself.
        ValueError: before training, if the model has no MoE layer, if the
            config's ``activation_checkpointing`` would cut the gradient of
            the auxiliary losses, if the core of a layer was wrapped by
            something that experts would bypass, if DDP broadcasts buffers, or
            if a batch will not divide into a router's groups.
    """

    def __init__(self, interval: int = 50) -> None:
        if interval < 1:
            raise ValueError(f'interval={interval} must be at least 1')
        self.interval = interval
        self._looks_always = False

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        _check_recomputation(
            model, runner.cfg.get('activation_checkpointing'))
        install(model)
        for key, layer in moe_layers(model).items():
            layer.check_core(key)
        check_buffers(runner.model)
        check_saving(runner)
        check_groups(model, 'group', 'train', runner.train_dataloader)
        if runner.val_loop is not None:
            check_groups(model, 'eval_group', 'val', runner.val_dataloader)
        self._prepare(model)

    def before_val(self, runner: Runner) -> None:
        self._prepare(unwrapped(runner.model))

    def before_test(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        check_groups(model, 'eval_group', 'test', runner.test_dataloader)
        self._prepare(model)

    def _prepare(self, model: nn.Module) -> None:
        install_padding(model)
        routers = [layer.router for layer in moe_layers(model).values()]
        alone = get_world_size() == 1
        for router in routers:
            router.raises_at_once = alone
        self._looks_always = not alone and all(
            router.not_finite.device.type == 'cpu' for router in routers)

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: Any = None, outputs: Any = None) -> None:
        if self._looks_always or self.every_n_train_iters(
                runner, self.interval):
            _check_finite(runner)

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        _check_finite(runner)

    def after_test_epoch(self, runner: Runner, metrics: Any = None) -> None:
        _check_finite(runner)


def _check_finite(runner: Runner) -> None:
    """Raise on all ranks if a router of any rank met nan or inf. If one rank
    stopped alone, the others would wait for it."""
    model = unwrapped(runner.model)
    if moe_layers(model):
        counts_RL = torch.stack(all_gather(take_not_finite(model)))
        raise_not_finite(model, counts_RL)


def install(model: nn.Module) -> None:
    """Register the forward hooks on a model; a second call changes nothing.

    Raises:
        ValueError: if the model has no MoE layer.
    """
    if not moe_layers(model):
        raise ValueError('MoELossHook found no MoE layer in the model: give '
                         'the backbone a moe=dict(layers=...), or remove the '
                         'hook')
    if _before in model._forward_pre_hooks.values():
        return
    model.register_forward_pre_hook(_before, with_kwargs=True)
    model.register_forward_hook(_after, with_kwargs=True)


def _check_recomputation(model: nn.Module, names: Any) -> None:
    """Raise if mmengine would wrap a router in activation checkpointing.

    mmengine's is reentrant: the first forward pass runs under no_grad. What
    a module stores in it beside its output, as routers do with auxiliary
    losses, never gets a gradient.

    Args:
        model: the model without a wrapper.
        names: the config's ``activation_checkpointing``, the name of a module
            or several names.
    """
    for name in (names, ) if isinstance(names, str) else names or ():
        inside = set(model.get_submodule(name).modules())
        for key, layer in moe_layers(model).items():
            if layer.router in inside:
                raise ValueError(
                    f'activation_checkpointing={names!r} wraps the router of '
                    f'{key} in a reentrant checkpoint, in which auxiliary '
                    'losses have no gradient. Remove it and set with_cp=True '
                    'in the backbone, or in moe of an rmoe.UpcycledBackbone: '
                    'that leaves the routing outside')


def _before(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get('mode') == 'loss':
        collect_losses(model, start=True)


def _after(model: nn.Module, args: tuple, kwargs: dict[str, Any],
           output: Any) -> Any:
    if kwargs.get('mode') != 'loss':
        return output
    # mmengine sums the entries whose keys contain "loss", and only logs the
    # others.
    return {
        **output,
        **{f'loss_moe_{name}': loss
           for name, loss in collect_losses(model, start=False).items()}
    }
