"""The auxiliary losses of routers, for a training loop without OpenMMLab."""
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe import collect_losses, moe_layers


def start_collecting(model: nn.Module) -> None:
    """Make the MoE layers of a model keep their auxiliary losses for
    :func:`auxiliary_loss`. A hook drops those of earlier forward passes."""
    model.register_forward_pre_hook(_begin)
    # The first call of a model may be another method than its forward, for
    # which the hook does not run.
    collect_losses(model, start=True)


def stop_collecting(model: nn.Module) -> None:
    """Remove the hook of :func:`start_collecting`."""
    for key in [key for key, hook in model._forward_pre_hooks.items()
                if hook is _begin]:
        del model._forward_pre_hooks[key]


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The sum of the routers' auxiliary losses, such as load balancing, in the
    last forward pass in training mode.

    Add it to the loss after each forward pass, before ``backward``. The losses
    are weighted already, by the ``loss_weights`` of the router.

    Args:
        model: a model that :func:`rmoe.upcycle` changed, or a module that
            contains it.

    Returns:
        A float32 scalar with a gradient; zero in evaluation, in the core
        stage, and with routers that have no auxiliary loss.

    Raises:
        ValueError: if the model has no MoE layer, or if a loss has no gradient
            although its router trains.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f'{type(model).__name__} has no MoE layer: call '
                         'rmoe.upcycle(model, layers=...) first')
    terms = collect_losses(model, start=False)
    collect_losses(model, start=True)
    if terms:
        return torch.stack(list(terms.values())).sum()
    device = next(iter(layers.values())).loads_2E.device
    return torch.zeros((), device=device)


def _begin(model: nn.Module, args: Any) -> None:
    if any(layer.losses for layer in moe_layers(model).values()):
        warnings.warn(
            'the auxiliary losses of the last forward pass were not taken '
            'and are dropped: add rmoe.auxiliary_loss(model) to the loss '
            'after each forward pass, or set loss_weights={} in the router '
            'to train without them', stacklevel=2)
    collect_losses(model, start=True)
