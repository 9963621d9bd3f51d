"""Scorers compute the router's logits: how well each expert suits each token.

Axis letters as in routing.py; P is the width of a projection.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe.moe.registry import MODELS


@MODELS.register_module()
class LinearScorer(nn.Module):
    """logits = W x.

    Args:
        dim: D.
        num_experts: E.
        init_std: standard deviation of the initial weights. They are small
            and random, because with zeros all experts would tie for every
            token.
    """

    def __init__(self, dim: int, num_experts: int,
                 init_std: float = 0.02) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.weight, std=self.init_std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) float32 to (T, E)."""
        return F.linear(x_TD, self.weight.float())


@MODELS.register_module()
class CosineScorer(nn.Module):
    """Cosine of the projected token and each expert's embedding, divided by a
    learned temperature (Swin-MoE; Tutel's cosine gate).

    logits = exp(min(temperature, log 100)) * cos(W x, embedding_e), where W
    is the projection. No logit is larger than 100.

    Args:
        dim: D.
        num_experts: E.
        proj_dim: P.
        init_temperature: t, the initial divisor of the cosine; the parameter
            ``temperature`` starts at log(1 / t).

    Raises:
        ValueError: if ``init_temperature`` is not positive.
    """
    MAX_TEMPERATURE = math.log(100)

    def __init__(self, dim: int, num_experts: int, proj_dim: int = 256,
                 init_temperature: float = 0.5) -> None:
        super().__init__()
        if not init_temperature > 0:
            raise ValueError(f'init_temperature={init_temperature} must be '
                             'positive')
        self.init_temperature = init_temperature
        self.projector = nn.Linear(dim, proj_dim)
        self.embeddings = nn.Parameter(torch.empty(num_experts, proj_dim))
        self.temperature = nn.Parameter(torch.empty(1))
        self.init_weights()

    def init_weights(self) -> None:
        self.projector.reset_parameters()
        nn.init.normal_(self.embeddings, std=0.01)
        nn.init.constant_(self.temperature,
                          math.log(1 / self.init_temperature))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) float32 to (T, E)."""
        tokens_TP = F.linear(x_TD, self.projector.weight.float(),
                             self.projector.bias.float())
        scale = self.temperature.float().clamp_max(self.MAX_TEMPERATURE).exp()
        return scale * F.linear(F.normalize(tokens_TP, dim=1),
                                F.normalize(self.embeddings.float(), dim=1))
