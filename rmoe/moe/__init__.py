"""The mixture-of-experts (MoE) layer: routers, experts and their losses.

It needs PyTorch but no OpenMMLab library. Backbones, hooks and
``rmoe.upcycle`` are built on it.
"""
from rmoe.moe.experts import Experts
from rmoe.moe.ffn import MoEFFN
from rmoe.moe.layer import MoELayer, collect_losses, moe_layers
from rmoe.moe.mix_ffn import MoEConvMlp, MoEMixFFN
from rmoe.moe.mlp import MoEMlp
from rmoe.moe.routers import (
    BiasBalancedRouter,
    CosineScorer,
    ExpertChoiceRouter,
    LinearScorer,
    SinkhornExpertChoiceRouter,
    SinkhornTokenChoiceRouter,
    SoftRouter,
    SparseExpertChoiceRouter,
    TokenChoiceRouter,
)
from rmoe.moe.routing import Routing, SoftRouting, compute_capacity

__all__ = [
    'BiasBalancedRouter', 'CosineScorer', 'ExpertChoiceRouter', 'Experts',
    'LinearScorer', 'MoEConvMlp', 'MoEFFN', 'MoELayer', 'MoEMixFFN',
    'MoEMlp', 'Routing',
    'SinkhornExpertChoiceRouter', 'SinkhornTokenChoiceRouter', 'SoftRouter',
    'SoftRouting', 'SparseExpertChoiceRouter', 'TokenChoiceRouter',
    'collect_losses', 'compute_capacity', 'moe_layers'
]
