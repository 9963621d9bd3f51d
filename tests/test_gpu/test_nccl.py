"""One process under DDP: nccl, and no search for unused parameters."""
import pytest
import torch
from gpu_cases import FLOAT32, build_backbone, loss_of, pictures
from routers import ROUTERS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rmoe.parallel import FullySharded

pytestmark = pytest.mark.gpu


class Loss(nn.Module):
    """DDP wraps what makes the loss."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return loss_of(self.backbone, images, FLOAT32)


@pytest.fixture
def group(tmp_path, device):
    torch.distributed.init_process_group(
        'nccl' if device == 'cuda' else 'gloo',
        init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('collapsed', [False, True])
@pytest.mark.parametrize('name', ROUTERS)
def test_two_steps(group, device, name, collapsed):
    """DDP refuses the second step if the first left a gradient out.
    ``collapsed``: equal scores, so that some experts get nothing."""
    plain, wrapped = (Loss(build_backbone('Swin', device, ROUTERS[name]))
                      for _ in range(2))
    for model in (plain, wrapped):
        for key, parameter in model.named_parameters():
            if collapsed and key.endswith('scorer.weight'):
                nn.init.zeros_(parameter)
    parallel = DistributedDataParallel(
        wrapped, device_ids=[0] if device == 'cuda' else None,
        find_unused_parameters=False, broadcast_buffers=False)
    for images in pictures(2, device):
        for model in (plain, parallel):
            model.zero_grad(set_to_none=True)
            model(images).backward()
        for (key, found), wanted in zip(wrapped.named_parameters(),
                                        plain.parameters(), strict=True):
            assert found.grad is not None, key
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3,
                                       atol=1e-5)


@pytest.mark.torch('2.8')
@pytest.mark.parametrize('name, param_dtype', [
    ('token choice, capacity', None), ('soft', None),
    # Rounded features change no decision of this one.
    ('soft', 'bfloat16')])
def test_two_sharded_steps(group, device, name, param_dtype):
    """All parts in one process; blocks gathered in bfloat16, too."""
    plain, inner = (Loss(build_backbone('Swin', device, ROUTERS[name]))
                    for _ in range(2))
    wrapped = FullySharded(inner, param_dtype=param_dtype)
    tolerance = 1e-3 if param_dtype is None else .1
    for images in pictures(2, device):
        for model in (plain, wrapped):
            model.zero_grad(set_to_none=True)
            model(images).backward()
        for (key, found), wanted in zip(inner.named_parameters(),
                                        plain.parameters(), strict=True):
            grad = getattr(found.grad, 'full_tensor', lambda g=found.grad: g)()
            assert (grad - wanted.grad).norm() <= (
                tolerance * wanted.grad.norm() + 1e-4), key
