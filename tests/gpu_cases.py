"""MoE layers and backbones on a device and in a precision, for test_gpu.

The suite runs on the CUDA device and is skipped where there is none.
RMOE_GPU_SUITE_DEVICE=cpu runs what makes sense on a CPU, to try the tests
themselves.
"""
import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.registry import DefaultScope
from routers import ROUTERS
from torch import Tensor, nn

from rmoe.moe import MoEFFN, collect_losses, moe_layers
from rmoe.registry import MODELS

DEVICE = os.environ.get('RMOE_GPU_SUITE_DEVICE', 'cuda')
E = 4
B, S = 3, 32
# D and H: what grouped products take, and what they do not.
WIDTHS = {'aligned': (64, 128), 'odd': (12, 20)}
EXPERTS: dict[str, dict] = {
    'core': {}, 'no core': dict(core=False), 'rank 4': dict(rank=4)}
# How long its solver runs depends on the tokens: it must ask the device.
WITHOUT_WAITING = [name for name in ROUTERS if not name.startswith('sparse')]
# A token may have any number of experts there, and a sum over them in the
# order that they finish in, unless torch's deterministic mode is on.
MANY_EXPERTS = [name for name in ROUTERS if 'expert choice' in name]


@dataclass(frozen=True)
class Precision:
    """What a layer computes in.

    Attributes:
        autocast: the type of products under autocast; None without it.
        pure: the type of parameters and tokens.
        tolerance: relative error, by norm, from the same in float32.
    """
    autocast: torch.dtype | None
    pure: torch.dtype
    tolerance: float

    def context(self, device: str) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device, self.autocast)


# One GPU had 7e-6, 4e-3 (float16) and 4e-2 (pure bfloat16) at worst.
PRECISIONS = {
    'float32': Precision(None, torch.float32, 1e-4),
    'bf16 autocast': Precision(torch.bfloat16, torch.float32, 4e-2),
    'fp16 autocast': Precision(torch.float16, torch.float32, 1e-2),
    'pure bf16': Precision(None, torch.bfloat16, 6e-2),
}
FLOAT32 = PRECISIONS['float32']


def build_layer(router: dict, widths: tuple[int, int] = WIDTHS['aligned'],
                **options: Any) -> MoEFFN:
    """On the CPU, with experts that differ and a router with opinions; every
    layer of the same arguments has the same weights."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('rmoe'):
        layer = MoEFFN(*widths, E, router=copy.deepcopy(router), **options)
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1:
            std = (2. if 'router' in name else 1.) * parameter.shape[-1]**-.5
            nn.init.normal_(parameter, std=std)
        elif 'bias' in name:
            nn.init.normal_(parameter, std=.3)
    return layer


def on(device: str, precision: Precision, layer: MoEFFN) -> MoEFFN:
    """A copy of the layer there, with its parameters in that precision."""
    return copy.deepcopy(layer).to(device, precision.pure)


def tokens(width: int, images: int = B, count: int = S) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, count, width, generator=generator)


def padding(images: int = B, count: int = S) -> Tensor:
    """An image with some, and one with nothing else."""
    valid = torch.ones(images, count, dtype=torch.bool)
    valid[0, 2 * count // 3:] = False
    valid[1] = False
    return valid


def train_pass(layer: MoEFFN, x: Tensor, weight: Tensor,
               precision: Precision, valid: Tensor | None = None
               ) -> dict[str, Tensor]:
    """Output, losses, counters and every gradient of one training step.

    Args:
        layer: on the device of the tokens, in their type.
        x: (B, S, D) tokens.
        weight: (B, S, D) float32, the gradient of the output.
        precision: of the layer.
        valid: (B, S) bool.
    """
    x = x.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    counters = dict(demand=layer.demand_E, kept=layer.kept_E,
                    tokens=layer.token_counts)
    for counter in counters.values():
        counter.zero_()
    collect_losses(layer, start=True)
    with precision.context(x.device.type):
        y = layer(x, valid=valid)
    losses = collect_losses(layer, start=False)
    total = (y.float() * weight).sum()
    for loss in losses.values():
        total = total + loss
    total.backward()
    gradients = {f'gradient of {name}': parameter.grad
                 for name, parameter in layer.named_parameters()
                 if parameter.grad is not None}
    return {'y': y.detach(), 'gradient of x': x.grad,
            **{f'loss {name}': loss.detach()
               for name, loss in losses.items()},
            **{name: counter.clone() for name, counter in counters.items()},
            **gradients}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Of the whole tensor, by its norm."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    size = wanted.norm()
    if not size:
        return float(found.norm())
    return float((found - wanted).norm() / size)


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """An error for whatever makes the host wait for the GPU."""
    if device != 'cuda':
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def capture(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """What repeats a run: by a CUDA graph there, elsewhere the run itself.

    On CUDA the run is warmed up first, and each repetition returns the same
    tensors with new values.
    """
    if device != 'cuda':
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


MOE = dict(num_experts=E, router=dict(
    type='TokenChoiceRouter', noise_std=0., top_k=2,
    loss_weights=dict(importance=.1)))
SIDE = 48
BACKBONES: dict[str, dict] = {
    'Swin': dict(
        type='rmoe.SwinMoE', embed_dims=32, depths=(1, 2), num_heads=(1, 2),
        strides=(4, 2), out_indices=(0, 1), window_size=4, drop_path_rate=0.,
        moe=dict(MOE, layers=((), (0, 1)))),
    'CvT': dict(
        type='rmoe.CvTMoE', embed_dims=(32, 64), depths=(1, 2),
        num_heads=(1, 2), patch_sizes=(7, 3), strides=(4, 2),
        patch_padding=(2, 1), drop_path_rates=(0., 0.), out_indices=(0, 1),
        moe=dict(MOE, layers=((), (0, 1)))),
    # At the size of its positions: what resizes them has no deterministic
    # backward on CUDA.
    'ViT': dict(
        type='rmoe.ViTMoE', embed_dims=32, num_layers=2, num_heads=2,
        mlp_dims=64, img_size=SIDE, moe=dict(MOE, layers=(0, 1))),
}


def build_backbone(name: str, device: str, router: dict | None = None
                   ) -> nn.Module:
    """With experts that differ, and routers with opinions; every backbone of
    the same arguments has the same weights."""
    torch.manual_seed(0)
    config = copy.deepcopy(BACKBONES[name])
    if router is not None:
        config['moe']['router'] = copy.deepcopy(router)
    backbone = MODELS.build(config)
    for key, parameter in backbone.named_parameters():
        if 'residual' in key or 'router' in key:
            nn.init.normal_(parameter, std=.2)
    backbone.to(device)
    assert moe_layers(backbone)
    return backbone


def pictures(count: int, device: str) -> Iterator[Tensor]:
    """So many batches of two; the same ones each time."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        yield torch.randn(2, 3, SIDE, SIDE, generator=generator).to(device)


def loss_of(backbone: nn.Module, images: Tensor, precision: Precision
            ) -> Tensor:
    """A scalar of its maps and its auxiliary losses.

    The square of a normalised map has no gradient to speak of: maps are
    compared with a pattern, made on the device.
    """
    collect_losses(backbone, start=True)
    with precision.context(images.device.type):
        outs = backbone(images)
    total = images.new_zeros(())
    for out in outs:
        pattern = torch.arange(out.numel(), device=out.device).mul(.7).cos()
        total = total + (out.float() - pattern.view(out.shape)
                         ).square().mean()
    for loss in collect_losses(backbone, start=False).values():
        total = total + loss
    return total
