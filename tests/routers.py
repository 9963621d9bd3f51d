"""Every router, as configs: tests iterate this table. A new router is a row.
"""
import copy

import torch
from mmengine.registry import DefaultScope

from rmoe.moe import MoEFFN, Routing

# Without noise, so that two calls decide alike.
ROUTERS = {
    'token choice': dict(type='TokenChoiceRouter', noise_std=0.),
    'token choice k=2': dict(type='TokenChoiceRouter', noise_std=0., top_k=2),
    'token choice, capacity': dict(
        type='TokenChoiceRouter', noise_std=0., top_k=2, capacity_factor=.6,
        eval_capacity_factor=.6, capacity_multiple=1, priority='bpr'),
    'sinkhorn token choice': dict(
        type='SinkhornTokenChoiceRouter', noise_std=0.),
    'sinkhorn token choice, plan': dict(
        type='SinkhornTokenChoiceRouter', noise_std=0., top_k=2,
        combine='plan', capacity_factor=1., capacity_multiple=1),
    'expert choice': dict(type='ExpertChoiceRouter', noise_std=0.),
    'expert choice c=2': dict(
        type='ExpertChoiceRouter', noise_std=0., capacity_factor=2.),
    'sinkhorn expert choice': dict(
        type='SinkhornExpertChoiceRouter', noise_std=0.),
    'sinkhorn expert choice, plan': dict(
        type='SinkhornExpertChoiceRouter', noise_std=0., combine='plan'),
    'sparse expert choice': dict(type='SparseExpertChoiceRouter'),
    'sparse expert choice, adam': dict(
        type='SparseExpertChoiceRouter', solver='adam', capacity_factor=1.),
    'soft': dict(type='SoftRouter', slots_per_expert=3),
    'cosine': dict(type='TokenChoiceRouter', noise_std=0.,
                   scorer=dict(type='CosineScorer', proj_dim=6)),
    'bias balanced': dict(type='BiasBalancedRouter'),
    'bias balanced k=2': dict(type='BiasBalancedRouter', top_k=2),
}
SPARSE = {name: router for name, router in ROUTERS.items() if name != 'soft'}
B, S = 3, 10
D, H, E = 12, 20, 4


def build_layer(router: dict, randomise: bool = True,
                widths: tuple[int, int] = (D, H), **options) -> MoEFFN:
    """A layer with random residuals, and a router with opinions."""
    with DefaultScope.overwrite_default_scope('rmoe'):
        layer = MoEFFN(*widths, **{'num_experts': E, **options,
                                'router': copy.deepcopy(router)})
    if randomise:
        for name, parameter in layer.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(
                    parameter, std=1. if 'router' in name else 0.3)
    return layer


def images(count: int = B, tokens: int = S, dim: int = D) -> torch.Tensor:
    return torch.randn(count, tokens, dim)


def route(layer: MoEFFN, x: torch.Tensor, valid: torch.Tensor | None = None):
    """What the layer's router decides for (B, S, D) images, without the rows
    that nobody serves."""
    routing = layer.router(x.reshape(-1, D), valid, len(x))
    return routing.served() if isinstance(routing, Routing) else routing
