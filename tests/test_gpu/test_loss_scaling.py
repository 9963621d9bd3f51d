"""float16 with a loss scale: the gradients are those without."""
import pytest
import torch
from gpu_cases import (
    EXPERTS,
    FLOAT32,
    PRECISIONS,
    build_layer,
    relative_error,
    tokens,
)
from mmengine.runner import Runner
from routers import ROUTERS
from torch import nn
from toy import toy_config

from rmoe.moe import collect_losses

pytestmark = pytest.mark.gpu
FLOAT16 = PRECISIONS['fp16 autocast']


def losses_of(layer, x, precision):
    """Of the task, as small as means of many are, and the auxiliary."""
    collect_losses(layer, start=True)
    with precision.context(x.device.type):
        y = layer(x)
    return 1e-4 * y.float().square().mean() + sum(
        collect_losses(layer, start=False).values())


@pytest.mark.parametrize('kind', EXPERTS)
@pytest.mark.parametrize('name', ROUTERS)
def test_gradients(device, name, kind):
    x = tokens(64).to(device)
    exact, layer = (build_layer(ROUTERS[name], **EXPERTS[kind]).to(device)
                    for _ in range(2))
    losses_of(exact, x, FLOAT32).backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.**16)
    scaler.scale(losses_of(layer, x, FLOAT16)).backward()
    scaler.unscale_(optimizer)
    largest = max(p.grad.norm() for p in exact.parameters())
    for (key, found), wanted in zip(layer.named_parameters(),
                                    exact.parameters(), strict=True):
        error = (found.grad - wanted.grad).norm()
        assert error <= .02 * wanted.grad.norm() + 1e-4 * largest, key
    start = nn.utils.parameters_to_vector(layer.parameters()).clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.**16
    end = nn.utils.parameters_to_vector(layer.parameters())
    assert end.isfinite().all() and not torch.equal(start, end)


def test_a_step_that_overflows_is_left_out(device):
    layer = build_layer(ROUTERS['token choice']).to(device)
    start = {key: value.clone() for key, value in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.**60)
    scaler.scale(losses_of(layer, tokens(64).to(device), FLOAT16)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.**59
    for key, value in layer.state_dict().items():
        assert torch.equal(value, start[key]), key


def test_in_a_runner(cuda, tmp_path):
    """mmengine's wrapper, with auxiliary losses: like float32's losses."""
    losses = {}
    for kind, wrapper in {
            'float32': {},
            'float16': dict(type='AmpOptimWrapper', dtype='float16',
                            loss_scale='dynamic')}.items():
        config = toy_config(tmp_path / kind, 8,
                            [dict(type='rmoe.MoELossHook')])
        config.optim_wrapper.update(wrapper)
        runner = Runner.from_cfg(config)
        runner.train()
        assert next(runner.model.parameters()).is_cuda
        scalars = runner.message_hub.log_scalars
        assert any('loss_moe' in key for key in scalars)
        losses[kind] = torch.tensor(scalars['train/loss'].data[0])
    assert relative_error(losses['float16'], losses['float32']) < .05
