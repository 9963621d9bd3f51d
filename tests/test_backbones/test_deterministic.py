"""Two training runs are bit-identical, and nothing in them is refused by
torch.use_deterministic_algorithms."""
import pytest
import torch
from accelerator import accelerated
from torch import nn

from rmoe.registry import MODELS

SWIN = dict(type='rmoe.SwinMoE', embed_dims=8, depths=(1, 2),
            num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1),
            window_size=4)
ROUTERS = {
    'token choice': dict(type='TokenChoiceRouter', top_k=2),
    'by priority': dict(type='TokenChoiceRouter', capacity_factor=.6,
                        priority='bpr'),
    'expert choice': dict(type='ExpertChoiceRouter', capacity_factor=2.),
    'sinkhorn': dict(type='SinkhornTokenChoiceRouter'),
    'bias balanced': dict(type='BiasBalancedRouter'),
    'soft': dict(type='SoftRouter', slots_per_expert=4),
}


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train(router: dict) -> torch.Tensor:
    """All parameters after three steps."""
    torch.manual_seed(0)
    model = MODELS.build(dict(
        SWIN, moe=dict(layers=((), (0, 1)), num_experts=4, router=router)))
    for name, parameter in model.named_parameters():
        if 'residual' in name or 'router' in name:
            nn.init.normal_(parameter, std=.3)
    start = nn.utils.parameters_to_vector(model.parameters()).clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        outs = model(torch.randn(2, 3, 48, 48))
        sum(out.square().mean() for out in outs).backward()
        optimizer.step()
    end = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert not torch.equal(start, end)
    return end


@pytest.mark.parametrize('accelerator', [False, True])
@pytest.mark.parametrize('name', ROUTERS)
def test_two_runs_are_bit_identical(deterministic, name, accelerator):
    with accelerated(accelerator):
        first, second = (train(ROUTERS[name]) for _ in range(2))
    assert torch.equal(first, second)
