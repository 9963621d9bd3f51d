"""Parameters and operations against arithmetic by hand."""
import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN

from rmoe.moe import MoEFFN
from rmoe.moe.complexity import complexity

D, H, E, T = 8, 16, 4, 10
FFN_PARAMS = 2 * D * H + D + H
FFN_FLOPS = T * 2 * 2 * D * H
ROUTER_PARAMS, ROUTER_FLOPS = D * E, 2 * T * D * E


def cost(model):
    return complexity(model, torch.randn(T, D))


def test_dense():
    found = cost(FFN(D, H, act_cfg=dict(type='GELU')))
    assert (found.total_params, found.active_params) == (FFN_PARAMS, ) * 2
    assert found.flops == FFN_FLOPS


@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('options, stored', [
    ({}, (E + 1) * FFN_PARAMS),
    (dict(core=False), E * FFN_PARAMS),
    (dict(rank=2), FFN_PARAMS + E * (4 * (D + H) + D + H)),
], ids=['core', 'no core', 'rank 2'])
def test_moe(k, options, stored):
    layer = MoEFFN(D, H, E, router=dict(type='TokenChoiceRouter', top_k=k),
                   **options)
    found = cost(layer)
    assert found.total_params == stored + ROUTER_PARAMS
    assert found.active_params == k * FFN_PARAMS + ROUTER_PARAMS
    if 'rank' not in options:
        assert found.flops == k * FFN_FLOPS + ROUTER_FLOPS


def test_core_only_costs_what_dense_costs():
    layer = MoEFFN(D, H, E)
    layer.core_only = True
    found = cost(layer)
    assert (found.active_params, found.flops) == (FFN_PARAMS, FFN_FLOPS)


def test_expert_choice_costs_its_evaluation_capacity():
    # ceil(10 * 2 / 4) = 5 tokens for each of four experts
    layer = MoEFFN(D, H, E, unrouted='zero', router=dict(
        type='ExpertChoiceRouter', capacity_factor=1.,
        eval_capacity_factor=2.))
    found = cost(layer.train())
    assert found.active_params == 2 * FFN_PARAMS + ROUTER_PARAMS
    assert found.flops == E * 5 * (FFN_FLOPS // T) + ROUTER_FLOPS
    assert layer.training


@pytest.mark.parametrize('align, ffns', [
    ('none', 0), ('difference', T)])
def test_soft_moe_costs_its_slots_and_its_mixing(align, ffns):
    slots = 2 * E
    layer = MoEFFN(D, H, E, align=align, router=dict(
        type='SoftRouter', slots_per_expert=2))
    found = cost(layer)
    rows = slots + (slots + ffns if align == 'difference' else 0)
    # logits, dispatch and combine: 2 T slots D each
    assert found.flops == rows * (FFN_FLOPS // T) + 3 * 2 * T * slots * D
    # every expert has a part in every token; 'difference' also the core
    folded = E + (align == 'difference')
    assert found.active_params == folded * FFN_PARAMS + slots * D + 1
