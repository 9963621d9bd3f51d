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
