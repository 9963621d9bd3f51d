"""Parameters and multiply-adds of a model with MoE layers."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rmoe import compat
from rmoe.moe.layer import MoELayer, moe_layers
from rmoe.moe.products import unpadded


@dataclass(frozen=True)
class Complexity:
    """What a model costs.

    Attributes:
        total_params: all parameters.
        active_params: those a token's result depends on (for expert choice
            on average), core and residual of an expert counted as one folded
            weight.
        flops: floating-point operations of one forward pass (a
            multiply-add is two), without the folding, which an inference
            engine does once.
    """
    total_params: int
    active_params: int
    flops: int


def complexity(model: nn.Module, *inputs: Tensor) -> Complexity:
    """Count parameters, and run one forward pass to count operations.

    Args:
        model: any module; its mode is kept.
        inputs: what it is called with.
    """
    total = sum(p.numel() for p in model.parameters())
    training = model.training
    model.eval()
    inactive = sum(inactive_params(layer)
                   for layer in moe_layers(model).values())
    # Attention is counted as plain matrix products, whatever kernel runs.
    with torch.no_grad(), unpadded(), \
            FlopCounterMode(display=False) as counter, \
            compat.plain_attention():
        model(*inputs)
    model.train(training)
    return Complexity(total, total - inactive, counter.get_total_flops())


def inactive_params(layer: MoELayer) -> int:
    """Parameters of a layer that a token does not meet, on average."""
    if layer.core_only:
        return sum(p.numel() for module in (layer.experts, layer.router)
                   for p in module.parameters())
    if layer.router.soft and layer.align == 'difference':
        return 0  # a token meets the core by itself and inside every expert
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
