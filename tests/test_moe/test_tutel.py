"""Tutel's rules, from the definitions in its source (2206.03382)."""
import copy
import math

import pytest
import torch
from routers import D, build_layer

from rmoe.moe import losses, tutel

G1 = torch.tensor([[.5, .4, .1], [.3, .3, .4], [.1, .2, .7], [.8, .2, 0.]])
LOGITS = torch.tensor([[.9, .06, .04], [.7, .18, .12], [.85, .05, .1]])
NOISE = torch.tensor([[-.037, .026, -.018], [-.074, .045, -.015],
                      [-.067, -.059, .073]])


@pytest.mark.parametrize('tokens, k, experts, factor, multiple, expected', [
    (32, 2, 32, 1., 1, 2),  # V-MoE's rule gives 4
    (33, 2, 32, 1., 1, 4),  # ceil(33 / 32) = 2 for each choice
    (100, 1, 8, 1.25, 1, 16),  # int(1.25 * 13) = int(16.25)
    (100, 2, 8, 1.25, 1, 32),  # twice int(16.25), not int(32.5)
    (100, 1, 8, -1.25, 1, 16),
    (100, 1, 8, 1.25, 6, 18),
    (0, 1, 8, 1.25, 1, 0),
])
def test_capacity(tokens, k, experts, factor, multiple, expected):
    assert tutel.compute_capacity(tokens, k, experts, factor,
                                  multiple) == expected


def test_a_capacity_below_one_says_what_to_set():
    with pytest.raises(ValueError, match=r'capacity_factor=0\.5 leaves no '
                       'slot.*tutel_compat=False'):
        tutel.compute_capacity(8, 1, 8, 0.5)


def test_importance_has_the_unbiased_variance():
    # sums 1.7, 1.1, 1.2: sum of squares about 4/3 is .20667, over 2 and over
    # (4/3)^2: .058125
    assert tutel.importance_loss(G1).item() == pytest.approx(.058125)


def test_one_expert_is_balanced():
    one = torch.ones(4, 1)
    assert tutel.importance_loss(one) == 0
    assert tutel.load_loss(one, one, 1, .1) == 0


def test_load_with_its_units_mended_is_v_moes_unbiased():
    # V-MoE's .4857386 is the population's; three experts: times 3 / 2
    load = losses.load_loss(LOGITS, LOGITS + NOISE, 2, .1).item()
    assert load * 1.5 == pytest.approx(.7286077, rel=1e-5)


def test_load_compares_probabilities_with_logits():
    noisy = LOGITS + NOISE
    loads = [0.] * 3
    for logits, chosen in zip(LOGITS.tolist(), noisy.tolist()):
        total = sum(math.exp(logit) for logit in logits)
        threshold = sorted(chosen)[-2]
        for expert, logit in enumerate(logits):
            distance = (math.exp(logit) / total - threshold) / .1
            loads[expert] += .5 * (1 + math.erf(distance / math.sqrt(2)))
    mean = sum(loads) / 3
    expected = sum((load - mean)**2 for load in loads) / 2 / mean**2
    found = tutel.load_loss(LOGITS, noisy, 2, .1).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(.7286077, rel=1e-2)


@pytest.mark.parametrize('factor, kept', [
    (1., 3), (-1., 3), (0., 12), (2., 6)])
def test_router_with_tutels_capacity(factor, kept):
    # twelve tokens that all want expert 2 of four: int(factor * 3) slots
    router = dict(type='TokenChoiceRouter', noise_std=0., group='batch',
                  capacity_factor=factor, tutel_compat=True)
    layer = build_layer(router)
    x = torch.ones(3, 4, D)
    layer.router.scorer.weight.data.zero_()[2] = 1.
    routing = layer.router(x.view(-1, D), None, 3)
    assert routing.counts_E.tolist() == [0, 0, kept, 0]
    assert routing.demand_E.tolist() == [0, 0, 12, 0]


def test_router_with_tutels_losses():
    router = dict(type='TokenChoiceRouter', top_k=2,
                  loss_weights=dict(importance=1., load=1.))
    ours = build_layer(router).router
    theirs = copy.deepcopy(ours)
    theirs.tutel_compat = True
    x = torch.randn(20, D)
    results = []
    for each in (ours, theirs):
        torch.manual_seed(0)
        results.append(each(x))
    logits = results[0].logits_TE
    assert results[1].losses['importance'].item() == pytest.approx(
        4 / 3 * results[0].losses['importance'].item(), rel=1e-4)
    assert results[1].losses['importance'].item() == pytest.approx(
        tutel.importance_loss(logits.softmax(1)).item())
    assert results[1].losses['load'] != results[0].losses['load']
