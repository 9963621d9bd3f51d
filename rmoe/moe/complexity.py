"""Counts the parameters and operations of a model with MoE layers.

Tools report these next to accuracy, so that MoE and dense models are compared
at equal cost.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rmoe import compat
from rmoe.moe.layer import MoELayer, moe_layers
from rmoe.moe.products import unpadded


@dataclass(frozen=True)
class Complexity:
    """The cost of a model.

    Attributes:
        total_params: number of all parameters.
        active_params: number of parameters on which the result of one token
            depends (for expert choice on average). Core and residual of an
            expert count as one weight, their sum.
        flops: floating-point operations of one forward pass; a multiply-add
            is two. Adding residuals to the core is not counted, since for
            inference it is done once.
    """
    total_params: int
    active_params: int
    flops: int


def complexity(model: nn.Module, *inputs: Tensor) -> Complexity:
    """Count parameters, and run one forward pass to count operations.

    Args:
        model: any module. The forward pass is in evaluation mode; afterwards
            the module is in the mode it was in.
        inputs: arguments of the forward pass.
    """
    total = sum(p.numel() for p in model.parameters())
    training = model.training
    model.eval()
    inactive = sum(inactive_params(layer)
                   for layer in moe_layers(model).values())
    # Attention is computed as plain matrix products here, so that the count
    # does not depend on the kernel that PyTorch would choose.
    with torch.no_grad(), unpadded(), \
            FlopCounterMode(display=False) as counter, \
            compat.plain_attention():
        model(*inputs)
    model.train(training)
    return Complexity(total, total - inactive, counter.get_total_flops())


def inactive_params(layer: MoELayer) -> int:
    """The number of a layer's parameters that a token does not use, on
    average."""
    if layer.core_only:
        return sum(p.numel() for module in (layer.experts, layer.router)
                   for p in module.parameters())
    if layer.router.soft and layer.align == 'difference':
        # A token uses the core by itself, and inside every expert.
        return 0
    experts = layer.experts
    expert_size = sum(
        part[0].numel() for name in ('fc1', 'fc2')
        for part in (experts.residual_weight(name),
                     getattr(experts, f'residual_{name}_bias'))
        if part is not None)
    stored = sum(p.numel() for p in experts.parameters())
    if experts.core:
        stored += expert_size
    return stored - round(layer.router.experts_per_token * expert_size)
