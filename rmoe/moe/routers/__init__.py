"""Routers: who chooses whom, one idea per file."""
from rmoe.moe.routers.bias_balanced import BiasBalancedRouter
from rmoe.moe.routers.expert_choice import (
    ExpertChoiceRouter,
    SinkhornExpertChoiceRouter,
    SparseExpertChoiceRouter,
)
from rmoe.moe.routers.scorers import CosineScorer, LinearScorer
from rmoe.moe.routers.soft import SoftRouter
from rmoe.moe.routers.token_choice import (
    SinkhornTokenChoiceRouter,
    TokenChoiceRouter,
)

__all__ = [
    'BiasBalancedRouter', 'CosineScorer', 'ExpertChoiceRouter',
    'LinearScorer', 'SinkhornExpertChoiceRouter', 'SinkhornTokenChoiceRouter',
    'SoftRouter', 'SparseExpertChoiceRouter', 'TokenChoiceRouter'
]
