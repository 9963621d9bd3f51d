"""The host never waits for the GPU, forward and backward."""
import pytest
import torch
from gpu_cases import (
    BACKBONES,
    EXPERTS,
    PRECISIONS,
    WITHOUT_WAITING,
    build_backbone,
    build_layer,
    loss_of,
    no_waiting,
    on,
    padding,
    pictures,
    tokens,
    train_pass,
)
from routers import ROUTERS

pytestmark = pytest.mark.gpu
# As they train by default: with noise and both losses.
AS_TRAINED = {
    'default': dict(type='TokenChoiceRouter'),
    'default, capacity': dict(type='TokenChoiceRouter', capacity_factor=1.,
                              eval_capacity_factor=1., priority='bpr'),
    'every loss': dict(type='TokenChoiceRouter', loss_weights=dict(
        importance=1., load=1., gshard=1., z=1.)),
    'batch': dict(type='TokenChoiceRouter', capacity_factor=1.,
                  group='batch', eval_group='batch', eval_capacity_factor=1.),
}
CASES = {name: ROUTERS[name] for name in WITHOUT_WAITING} | AS_TRAINED


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('kind', EXPERTS)
@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('name', CASES)
def test_layer(device, name, precision, kind, padded):
    case = PRECISIONS[precision]
    layer = on(device, case, build_layer(CASES[name], **EXPERTS[kind]))
    x = tokens(64).to(device, case.pure)
    weight = tokens(64).to(device)
    valid = padding().to(device) if padded else None
    train_pass(layer, x, weight, case, valid)  # what is made once
    with no_waiting(device):
        train_pass(layer, x, weight, case, valid)
    layer.eval()
    with torch.no_grad(), case.context(device):
        layer(x, valid=valid)
        with no_waiting(device):
            layer(x, valid=valid)


@pytest.mark.parametrize('precision', ['float32', 'bf16 autocast'])
@pytest.mark.parametrize('name', BACKBONES)
def test_backbone(device, name, precision):
    case = PRECISIONS[precision]
    backbone = build_backbone(name, device)
    images, = pictures(1, device)
    loss_of(backbone, images, case).backward()
    with no_waiting(device):
        loss_of(backbone, images, case).backward()


def test_what_waits_is_found(cuda):
    """The guard works: reading a value is an error inside it."""
    x = torch.ones(3, device=cuda)
    with no_waiting(cuda), pytest.raises(RuntimeError, match='synchroniz'):
        x.sum().item()
    assert x.sum().item() == 3
