"""Routers decide which token goes to which expert, and with which gate.

In :mod:`token_choice` and :mod:`bias_balanced` tokens choose experts, in
:mod:`expert_choice` experts choose tokens, in :mod:`soft` experts get
mixtures of tokens. :mod:`scorers` compute the logits.
"""
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
