"""Measures MoE layers over the dense FFN of the same width."""
from collections.abc import Iterable, Sequence

import torch
from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from _bench.ceilings import probe_of
from _bench.counting import counts
from _bench.limit import work_of_ffn
from _bench.passes import FORWARD, LOSSES, TRAIN, step
from _bench.timing import DEVICE, Row, interleave
from rmoe.moe import MoEFFN
from rmoe.moe.products import linear

Size = tuple[int, int, int]
SIZES: tuple[Size, ...] = ((
    (2048, 384, 8), (8192, 384, 8), (32768, 192, 8), (8192, 768, 8),
    (32768, 768, 16), (65536, 1024, 32)) if DEVICE == 'cuda' else (
    (2048, 384, 8), (512, 768, 8), (8192, 384, 8), (32768, 192, 8),
    (8192, 384, 32)))
GROWTH = (8, 16, 32, 64)
DENSE, SAME_PRODUCTS = 'dense FFN', 'dense, same products'
# Experts that were folded for inference also compute as those without a core.
KINDS = {'no core': dict(core=False), 'core + residual': {},
         'rank 16': dict(rank=16), 'K = 2': dict(top_k=2)}


class FastFFN(nn.Module):
    """A dense FFN that uses the same function for matrix products as MoE
    layers."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.layers = ffn.layers

    def forward(self, x: Tensor) -> Tensor:
        (fc1, act, _), fc2, _ = self.layers
        return x + _linear(act(_linear(x, fc1)), fc2)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return _Linear.apply(x, layer.weight, layer.bias)


class _Linear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor
                ) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return linear(x_TI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TI, weight_OI = ctx.saved_tensors
        return (linear(grad_TO, weight_OI.t()),
                linear(grad_TO.t(), x_TI.t()), grad_TO.sum(0))


def dense_ffn(dim: int) -> FFN:
    return FFN(dim, 4 * dim, act_cfg=dict(type='GELU'))


def moe_layer(dim: int, experts: int, losses: bool = False, **options
              ) -> MoEFFN:
    """Build a MoE layer on the device.

    Args:
        dim: D.
        experts: E.
        losses: whether its router produces its auxiliary losses, if it has
            any.
        options: further arguments of MoEFFN.
    """
    # The weights are drawn on the device, because a GPU is much faster at it.
    with torch.device(DEVICE):
        layer = MoEFFN(dim, 4 * dim, experts, **options)
    if not losses:
        layer.router.loss_weights = {}
    spread_load([layer])
    return layer


def layer_of(kind: str, dim: int, experts: int, losses: bool = False
             ) -> MoEFFN:
    """Build the MoE layer of one of KINDS."""
    options = dict(KINDS[kind])
    router = dict(type='TokenChoiceRouter', top_k=options.pop('top_k', 1))
    return moe_layer(dim, experts, losses, router=router, **options)


def spread_load(modules: Iterable[nn.Module]) -> None:
    """Give routers weights with which they use every expert about equally on
    random tokens."""
    for module in modules:
        if isinstance(module, MoEFFN) and hasattr(
                getattr(module.router, 'scorer', None), 'weight'):
            nn.init.normal_(module.router.scorer.weight, std=1.)


def benchmark_layers(repeats: int, sizes: Sequence[Size] = SIZES,
                     kinds: Sequence[str] = tuple(KINDS),
                     modes: Sequence[str] = (LOSSES, TRAIN, FORWARD)
                     ) -> list[Row]:
    """Time of MoE layers over that of the dense FFN. The FFN is measured as
    PyTorch computes it, and with the function for products that MoE layers
    use. The limit of the machine is given over the first of these times.

    Training is measured with the auxiliary losses of the layers and without
    them.
    """
    rows = []
    for tokens, dim, experts in sizes:
        models: dict[str, nn.Module] = {DENSE: dense_ffn(dim).to(DEVICE)}
        # On other devices that function is PyTorch's own.
        if DEVICE == 'cpu':
            models[SAME_PRODUCTS] = FastFFN(dense_ffn(dim))
        models.update({kind: layer_of(kind, dim, experts, losses=True)
                       for kind in kinds})
        probe = probe_of(tokens, dim, 4 * dim, experts)
        x = torch.randn(tokens, dim, device=DEVICE, requires_grad=True)
        for mode in modes:
            for name in kinds if mode == TRAIN else ():
                models[name] = layer_of(name, dim, experts)
            steps = {name: step(model, x, mode)
                     for name, model in models.items()}
            seconds = interleave(steps | probe.steps(), repeats)
            rates = probe.rates(seconds, mode)
            same = seconds.get(SAME_PRODUCTS, seconds[DENSE])
            for name, model in models.items():
                work = work_of_ffn(
                    tokens, dim, 4 * dim, mode,
                    **dict(experts=experts, **KINDS[name])
                    if name in KINDS else {})
                rows.append({
                    'T': tokens, 'D': dim, 'E': experts, 'measured': mode,
                    'layer': name, 'ms': round(1e3 * seconds[name], 2),
                    'over dense': round(seconds[name] / seconds[DENSE], 3),
                    'limit over dense': round(
                        work.seconds(rates) / seconds[DENSE], 3),
                    'over same products': round(seconds[name] / same, 3),
                    'parameters over dense': round(
                        parameters(model) / parameters(models[DENSE]), 3),
                    **counts(steps[name]),
                    'GFLOP/s': round(rates.multiply / 1e9, 1),
                    'GB/s': round(rates.stream / 1e9, 1)})
    return rows


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def benchmark_growth(repeats: int, experts: Sequence[int] = GROWTH,
                     tokens_per_expert: int = 256, dim: int = 384
                     ) -> list[Row]:
    """Time per token of layers with more and more experts, and as many more
    tokens."""
    rows = []
    for kind in ('no core', 'core + residual'):
        steps = {}
        for count in experts:
            x = torch.randn(count * tokens_per_expert, dim, device=DEVICE,
                            requires_grad=True)
            steps[count] = step(layer_of(kind, dim, count), x, TRAIN)
        seconds = interleave(steps, repeats)
        per_token = {count: seconds[count] / (count * tokens_per_expert)
                     for count in experts}
        rows += [{'E': count, 'T': count * tokens_per_expert, 'D': dim,
                  'measured': TRAIN, 'layer': kind,
                  'us per token': round(1e6 * per_token[count], 2),
                  f'over E = {experts[0]}': round(
                      per_token[count] / per_token[experts[0]], 3)}
                 for count in experts]
    return rows
