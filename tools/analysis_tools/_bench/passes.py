"""Makes the function that runs one pass of a model, which is then timed."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from _bench.precision import autocast
from rmoe.moe import collect_losses

FORWARD, TRAIN = 'forward', 'forward+backward'
# The auxiliary losses are collected and added, as MoELossHook does.
LOSSES = 'forward+backward, losses'
Run = Callable[[], None]


def step(model: nn.Module, x: Tensor, mode: str) -> Run:
    """A function that runs one pass of a model.

    Args:
        model: a model that returns a tensor or several.
        x: its input. It gets a gradient if it requires one.
        mode: FORWARD is a forward pass in evaluation mode. TRAIN is a forward
            and a backward pass in training mode, from gradients of ones to
            everything that requires a gradient. LOSSES is the same with the
            auxiliary losses of MoE layers. In training the layers count their
            loads.
    """

    def forward() -> None:
        model.eval()
        with torch.no_grad(), autocast():
            model(x)

    def forward_backward() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        x.grad = None
        if mode == LOSSES:
            collect_losses(model, start=True)
        with autocast():
            outs = model(x)
        outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
        if mode == LOSSES:
            losses = collect_losses(model, start=False)
            if losses:
                outs.append(torch.stack(list(losses.values())).sum())
        outs = [out for out in outs if out.requires_grad]
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])

    return forward if mode == FORWARD else forward_backward
