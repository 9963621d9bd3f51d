"""The same input and seed give the same bits."""
import pytest
import torch
from gpu_cases import (
    BACKBONES,
    EXPERTS,
    FLOAT32,
    MANY_EXPERTS,
    PRECISIONS,
    build_backbone,
    build_layer,
    loss_of,
    on,
    padding,
    pictures,
    tokens,
    train_pass,
)
from routers import ROUTERS
from torch import nn

pytestmark = pytest.mark.gpu
# Enough rows that additions without an order would show.
COUNT = 2048
REPEATS = 4


@pytest.mark.parametrize('kind', EXPERTS)
@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize(
    'name', [name for name in ROUTERS if name not in MANY_EXPERTS])
def test_layer(device, name, precision, kind):
    assert_repeats(device, name, precision, kind)


@pytest.mark.parametrize('kind', EXPERTS)
@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('name', MANY_EXPERTS)
def test_expert_choice_in_deterministic_mode(deterministic, device, name,
                                             precision, kind):
    assert_repeats(device, name, precision, kind)


def assert_repeats(device, name, precision, kind):
    case = PRECISIONS[precision]
    count = COUNT if device == 'cuda' else 64
    layer = on(device, case, build_layer(ROUTERS[name], **EXPERTS[kind]))
    x = tokens(64, count=count).to(device, case.pure)
    weight = tokens(64, count=count).flip(1).to(device)
    valid = padding(count=count).to(device)
    for mask in (None, valid):
        first, *others = (train_pass(layer, x, weight, case, mask)
                          for _ in range(REPEATS if mask is None else 2))
        for other in others:
            changed = [key for key, value in first.items()
                       if not torch.equal(other[key], value)]
            assert not changed


@pytest.mark.parametrize('precision', ['float32', 'bf16 autocast'])
@pytest.mark.parametrize(
    'name', [name for name in ROUTERS if not name.startswith('sparse')])
def test_training_in_deterministic_mode(deterministic, device, name,
                                        precision):
    """Also: nothing in it is refused."""
    first, second = (train('Swin', device, PRECISIONS[precision],
                           ROUTERS[name]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize('precision', ['float32', 'bf16 autocast'])
@pytest.mark.parametrize('backbone', BACKBONES)
def test_training_of_every_backbone(deterministic, device, backbone,
                                    precision):
    first, second = (train(backbone, device, PRECISIONS[precision])
                     for _ in range(2))
    assert torch.equal(first, second)


def train(name, device, precision, router=None) -> torch.Tensor:
    """All parameters after three steps with noise from the same seed."""
    backbone = build_backbone(name, device, router)
    torch.manual_seed(0)
    start = nn.utils.parameters_to_vector(backbone.parameters()).clone()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-3)
    for images in pictures(3, device):
        optimizer.zero_grad()
        loss_of(backbone, images, precision).backward()
        optimizer.step()
    end = nn.utils.parameters_to_vector(backbone.parameters()).detach()
    assert end.isfinite().all() and not torch.equal(start, end)
    return end


def test_seeds_matter(device):
    """Noise of the router: another seed is another training."""
    ends = []
    for seed in (0, 1):
        layer = build_layer(dict(type='TokenChoiceRouter')).to(device)
        torch.manual_seed(seed)
        found = train_pass(layer, tokens(64).to(device),
                           tokens(64).to(device), FLOAT32)
        ends.append(found['gradient of router.scorer.weight'])
    assert not torch.equal(*ends)
