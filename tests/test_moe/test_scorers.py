"""Logits of the cosine scorer, from Tutel's definition."""
import math

import pytest
import torch

from rmoe.moe import CosineScorer


def test_cosine_over_temperature():
    scorer = CosineScorer(dim=5, num_experts=3, proj_dim=4,
                          init_temperature=0.5)
    assert scorer.temperature.item() == pytest.approx(math.log(2))
    x = torch.randn(6, 5)
    projected = x @ scorer.projector.weight.t() + scorer.projector.bias
    for token, row in zip(projected, scorer(x)):
        for embedding, logit in zip(scorer.embeddings, row):
            cosine = token @ embedding / (token.norm() * embedding.norm())
            assert logit.item() == pytest.approx(2 * cosine.item(), abs=1e-5)


def test_the_temperature_is_clamped():
    # exp(log 100): no logit is larger than 100, however far it has drifted
    scorer = CosineScorer(dim=5, num_experts=3, proj_dim=4)
    scorer.temperature.data.fill_(10.)
    embedding = scorer.embeddings.data[0]
    scorer.projector.weight.data.zero_()
    scorer.projector.bias.data.copy_(embedding)
    assert scorer(torch.randn(2, 5))[:, 0].tolist() == pytest.approx([100.] * 2)
