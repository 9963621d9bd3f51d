"""Auxiliary losses of MoE layers, for any segmentor or detector."""
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from rmoe.moe import collect_losses, moe_layers
from rmoe.registry import HOOKS


@HOOKS.register_module()
class MoELossHook(Hook):
    """Adds ``loss_moe_*`` to the loss dict of the model.

    A pair of forward hooks on the model collects what its MoE layers produce
    while it computes losses. The terms go through the same sum, loss scale
    and gradient accumulation as every other loss, and show in the log.
    """

    def before_train(self, runner: Runner) -> None:
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        install(model)


def install(model: nn.Module) -> None:
    """Put the hooks on a model; a second call changes nothing.

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


def _before(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get('mode') == 'loss':
        collect_losses(model, start=True)


def _after(model: nn.Module, args: tuple, kwargs: dict[str, Any],
           output: Any) -> Any:
    if kwargs.get('mode') != 'loss':
        return output
    # mmengine sums the keys that contain "loss" and logs the others.
    return {
        **output,
        **{f'loss_moe_{name}': loss
           for name, loss in collect_losses(model, start=False).items()}
    }
