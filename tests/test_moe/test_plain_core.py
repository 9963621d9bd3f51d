"""Cores whose linear layers are wrapped: refused, or computed correctly."""
import copy
import warnings

import pytest
import torch
from mmcv.cnn.bricks import wrappers
from mmcv.cnn.bricks.transformer import FFN
from routers import D, H, build_layer
from torch import nn
from torch.nn.utils import parametrize

from rmoe.moe import MoEFFN
from rmoe.moe.plain_core import check_plain

ROUTER = dict(type='TokenChoiceRouter', top_k=2, noise_std=0.,
              capacity_factor=.6, loss_weights={})


class Adapter(nn.Module):
    """A wrapper as in peft, which shows the weight of the layer inside."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_a = nn.Linear(base.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


class Float8Linear(nn.Linear):
    """A subclass that computes its own product, as in low-precision
    libraries."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.half().to(x.dtype))


class LowRank(nn.Module):
    """w + up down, as a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(H, 2))
        self.down = nn.Parameter(torch.randn(2, D))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def float8(linear: nn.Linear) -> nn.Module:
    return Float8Linear(linear.in_features, linear.out_features)


def with_old_norm(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():  # deprecated, and used
        warnings.simplefilter('ignore')
        return nn.utils.weight_norm(linear)


def hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda module, args, out: 2 * out)
    return linear


def hooked_before(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, args: (2 * args[0], ))
    return linear


def hooked_in_backward(linear: nn.Linear) -> nn.Module:
    linear.register_full_backward_hook(lambda module, args, grads: None)
    return linear


def overridden(linear: nn.Linear) -> nn.Module:
    linear.forward = lambda x: x @ linear.weight.mT
    return linear


def parametrized_subclass(linear: nn.Linear) -> nn.Module:
    wrapped = Float8Linear(linear.in_features, linear.out_features)
    parametrize.register_parametrization(wrapped, 'weight', nn.Identity())
    return wrapped


WRAPPED = {
    Adapter: 'is a .*Adapter, not', float8: 'is a .*Float8Linear, not',
    parametrized_subclass: r'is a (\w+\.)+Float8Linear, not',
    with_old_norm: 'has a hook in _forward_pre_hooks, WeightNorm',
    hooked: r'has a hook in _forward_hooks, hooked.<locals>.<lambda>',
    hooked_before: 'has a hook in _forward_pre_hooks',
    hooked_in_backward: 'has a hook in _backward_hooks',
    overridden: r'has a forward\(\) put in place',
}
wrapped_core = pytest.mark.parametrize(
    'wrap', WRAPPED, ids=lambda wrap: wrap.__name__)


def wrap_first(layer: MoEFFN, wrap) -> None:
    layer.layers[0][0] = wrap(layer.layers[0][0])


@wrapped_core
def test_a_wrapped_core_is_refused_at_the_first_forward(wrap):
    layer = build_layer(ROUTER)
    layer.name = 'MoE layer of stage 1, block 2'
    wrap_first(layer, wrap)
    for _ in range(2):  # not the first time only
        with pytest.raises(ValueError, match='MoE layer of stage 1, block 2: '
                           f'layers.0.0 {WRAPPED[wrap]}.*rank='):
            layer(torch.randn(5, D))


@wrapped_core
def test_a_core_that_is_wrapped_later_is_refused_in_training(wrap):
    layer = build_layer(ROUTER)
    layer(torch.randn(5, D))
    wrap_first(layer, wrap)
    with pytest.raises(ValueError, match=r'neck.ffn: layers.0.0 '
                       + WRAPPED[wrap]):
        layer.check_core('neck.ffn')


def test_a_core_that_is_replaced_later_is_refused_at_the_next_forward():
    layer = build_layer(ROUTER)
    layer(torch.randn(5, D))
    layer.layers[1] = Adapter(layer.layers[1])
    with pytest.raises(ValueError, match=r'a MoE layer: layers.1 is a '):
        layer(torch.randn(5, D))


@pytest.mark.parametrize('linear', [
    nn.Linear(D, H), wrappers.Linear(D, H), nn.Conv2d(D, H, 1),
    wrappers.Conv2d(D, H, 1)], ids=lambda linear: str(type(linear)))
def test_what_the_host_libraries_build_is_plain(linear):
    check_plain(linear, '')
    parametrize.register_parametrization(linear, 'weight', nn.Identity())
    check_plain(linear, '')


@pytest.mark.parametrize('options', [
    dict(kernel_size=3, padding=1), dict(kernel_size=1, stride=2),
    dict(kernel_size=1, groups=2), dict(kernel_size=1, padding=1)], ids=str)
@pytest.mark.parametrize('kind', [nn.Conv2d, wrappers.Conv2d])
def test_another_convolution_is_refused(kind, options):
    with pytest.raises(ValueError, match='layer x is no 1x1 convolution but '
                       r'Conv2d\('):
        check_plain(kind(D, H, **options), 'layer x')


def test_hooks_may_watch_a_trace():
    """While a model is traced, operation counters use hooks to name
    scopes."""
    linear = hooked(nn.Linear(D, H))

    def function(x: torch.Tensor) -> torch.Tensor:
        check_plain(linear, '')
        return x + 1

    torch.jit.trace(function, torch.ones(1), check_trace=False)
    with pytest.raises(ValueError, match='has a hook'):
        function(torch.ones(1))


def test_experts_without_a_core_and_mmcvs_own_ffn_are_plain():
    build_layer(ROUTER, core=False)(torch.randn(5, D))
    MoEFFN.from_dense(FFN(D, H), router=ROUTER)(torch.randn(5, D))


def test_a_parametrized_core_is_folded_with_its_gradient():
    """w = core + up down: the gradients of up and down follow from that of
    the whole weight by hand."""
    layer = build_layer(ROUTER)
    linear, low_rank = layer.layers[0][0], LowRank()
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.layers[0][0].weight += low_rank.up @ low_rank.down
    parametrize.register_parametrization(linear, 'weight', low_rank)
    x = torch.randn(2, 9, D)
    for one in (layer, plain):
        y = one(x)
        y.square().sum().backward()
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-4)
    whole = plain.layers[0][0].weight.grad
    assert whole.norm() > 1
    for found, expected in (
            (linear.parametrizations.weight.original.grad, whole),
            (low_rank.up.grad, whole @ low_rank.down.mT),
            (low_rank.down.grad, low_rank.up.mT @ whole)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
