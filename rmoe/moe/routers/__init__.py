"""Routers decide which token goes to which expert, and with which gate.

In ``token_choice.py`` and ``bias_balanced.py`` tokens choose experts, in
``expert_choice.py`` experts choose tokens, and in ``soft.py`` experts get
mixtures of tokens. The classes of ``scorers.py`` compute the logits.
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
