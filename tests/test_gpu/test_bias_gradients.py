"""Gradients of biases are sums over an expert's rows, in float32.

A sum in bfloat16 rounds every addition, and is off by percents that grow with
the rows. A CPU's kernel does not round each addition: only a GPU can tell.
"""
import copy

import pytest
import torch
from gpu_cases import (
    EXPERTS,
    FLOAT32,
    PRECISIONS,
    E,
    build_layer,
    on,
    relative_error,
    train_pass,
)
from routers import ROUTERS
from torch import nn

pytestmark = pytest.mark.gpu
TOLERANCE = 0.01
DIM = 64
SIGNS = {'zero mean': lambda weight: weight, 'one sign': torch.abs}


@pytest.mark.parametrize('sign', SIGNS)
@pytest.mark.parametrize('kind', EXPERTS)
@pytest.mark.parametrize('precision', ['bf16 autocast', 'pure bf16'])
@pytest.mark.parametrize('rows', [512, 8192])
def test_within_one_percent(device, rows, precision, kind, sign):
    case = PRECISIONS[precision]
    layer = build_layer(ROUTERS['token choice'], **EXPERTS[kind])
    # Equal loads; a router that does not learn has no part in it.
    nn.init.zeros_(layer.router.scorer.weight)
    with torch.no_grad():
        layer.router.scorer.weight[:, :E] = 8 * torch.eye(E)
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(E, rows, DIM, generator=generator)
                 for _ in range(2))
    x[..., :E] = torch.eye(E)[:, None]
    weight = SIGNS[sign](weight).bfloat16().float().to(device)
    x = x.bfloat16().float().to(device)
    exact = on(device, case, layer).float()
    wanted = train_pass(exact, x, weight, FLOAT32)
    assert wanted['kept'].tolist() == E * [rows]
    found = train_pass(on(device, case, copy.deepcopy(layer)),
                       x.to(case.pure), weight, case)
    errors = {name: relative_error(found[name], value)
              for name, value in wanted.items()
              if name.startswith('gradient') and 'bias' in name}
    assert len(errors) == (2 if kind == 'no core' else 4)
    assert max(errors.values()) < TOLERANCE, errors
