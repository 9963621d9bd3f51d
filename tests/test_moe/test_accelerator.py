"""The accelerator's path gives the CPU's results for any load, and never waits
for the device."""
import itertools
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from accelerator import (
    NoWaiting,
    Operators,
    accelerated,
    assert_same,
    results,
)
from routers import ROUTERS, B, S, build_layer, images, route
from torch.utils._python_dispatch import TorchDispatchMode

from rmoe import compat
from rmoe.moe import MoEFFN, grouped_mm

FIXED = {name: router for name, router in ROUTERS.items()
         if not name.startswith('sparse')}
FIXED['token choice, first come'] = dict(
    type='TokenChoiceRouter', noise_std=0., top_k=2, capacity_factor=.7,
    eval_capacity_factor=.7, capacity_multiple=1)
FIXED['token choice, by sum'] = dict(
    FIXED['token choice, capacity'], priority='bpr_sum', group='batch',
    eval_group='batch')
FIXED['token choice, tutel'] = dict(
    FIXED['token choice, first come'], tutel_compat=True, noise_std=1.,
    capacity_factor=1.)
FIXED['every loss'] = dict(
    type='TokenChoiceRouter', noise_std=0.,
    loss_weights=dict(importance=1., gshard=1., z=1.))
FIXED['expert choice, batch'] = dict(
    FIXED['expert choice c=2'], group='batch', eval_group='batch')


# Older versions of torch have no float16 autocast on the CPU.
FLOAT16 = pytest.mark.torch('2.4')
KINDS = ['float32', 'bfloat16', pytest.param('float16', marks=FLOAT16)]


def under(dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to a type; for float32 no autocast."""
    return (nullcontext() if dtype == torch.float32
            else torch.autocast('cpu', dtype))


def options_of(router: dict):
    """All combinations of align, unrouted and core that a router allows."""
    if router['type'] == 'SoftRouter':
        return [dict(align='difference'), dict(align='none', core=False)]
    return [dict(align=align, unrouted=unrouted, core=core)
            for align, (unrouted, core) in itertools.product(
                ('stopgrad', 'straight_through', 'none', 'renormalize'),
                (('core', True), ('zero', True), ('zero', False)))]


def some_padding(kind: str) -> torch.Tensor | None:
    if kind == 'all valid':
        return None
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, 7:] = False
    # one image is padding alone
    valid[1] = kind != 'an empty image'
    return valid


@pytest.mark.parametrize('padding', ['all valid', 'padded', 'an empty image'])
@pytest.mark.parametrize('name', FIXED)
def test_equals_the_cpu(name, padding):
    valid = some_padding(padding)
    for options in options_of(FIXED[name]):
        layer = build_layer(FIXED[name], **options)
        x = images()
        # In all other cases padding goes through the core, which would return
        # nan.
        if valid is not None and layer.unrouted == 'zero' and (
                layer.align != 'difference'):
            x[~valid] = float('nan')
        wanted = results(layer, x, valid)
        with accelerated():
            assert_same(results(layer, x, valid), wanted)
        layer.eval()
        with torch.no_grad():
            with accelerated():
                y = layer(x, valid=valid)
            torch.testing.assert_close(y, layer(x, valid=valid),
                                       equal_nan=True)


@pytest.mark.parametrize('tokens', [0, 1, 3])
@pytest.mark.parametrize('name', FIXED)
def test_more_experts_than_tokens(name, tokens):
    layer = build_layer(FIXED[name], num_experts=16)
    x = images(1, tokens)
    wanted = results(layer, x)
    with accelerated():
        assert_same(results(layer, x), wanted)


def test_a_router_that_cannot_be_traced_says_so(monkeypatch):
    layer = build_layer(ROUTERS['sparse expert choice'])
    monkeypatch.setattr(compat, 'is_compiling', lambda: True)
    with pytest.raises(ValueError, match='SparseExpertChoiceRouter cannot'
                       r' be compiled.*SinkhornExpertChoiceRouter'):
        layer(images())


@pytest.mark.parametrize('name', FIXED)
def test_bfloat16_is_routed_in_float32(name):
    """In pure bfloat16 and under autocast, routers decide like a float32
    router with the same weights on the same tokens."""
    layer = build_layer(FIXED[name]).bfloat16().eval()
    x = images().bfloat16()
    found = route(layer, x)
    exact = build_layer(FIXED[name], randomise=False).eval()
    exact.load_state_dict(layer.state_dict())
    wanted = route(exact, x.float())
    with torch.autocast('cpu', torch.bfloat16):
        under_autocast = route(exact, x)
    for routing in (found, under_autocast):
        for key in dir(wanted):
            value = getattr(wanted, key)
            if isinstance(value, torch.Tensor):
                assert getattr(routing, key).dtype == value.dtype, key
                assert torch.equal(getattr(routing, key), value), key


@pytest.mark.parametrize('kind', [
    'bfloat16', 'bfloat16 autocast',
    pytest.param('float16 autocast', marks=FLOAT16)])
@pytest.mark.parametrize('widths', [(16, 24), (12, 20)], ids=[
    'grouped product', 'blocks'])
@pytest.mark.parametrize('name', FIXED)
def test_half_precision_equals_the_cpu(name, widths, kind):
    """The grouped product takes widths that are multiples of eight; others
    are computed in blocks."""
    layer = build_layer(FIXED[name], widths=widths)
    x = images(dim=widths[0])
    autocast = 'autocast' in kind
    dtype = torch.float16 if 'float16' in kind.split() else torch.bfloat16
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    kinds = {key: value.dtype for key, value in layer.state_dict().items()}
    outputs, gradients = [], []
    for on in (False, True):
        torch.manual_seed(1)
        layer.zero_grad()
        layer.losses = []
        with accelerated(on):
            with under(dtype) if autocast else nullcontext():
                y = layer(x)
            assert y.dtype == x.dtype
            (y.float().square().mean() + sum(
                loss for losses in layer.losses for loss in losses.values())
             ).backward()
        outputs.append(y.detach())
        gradients.append(torch.cat([
            parameter.grad.flatten().float()
            for parameter in layer.parameters()]))
        assert gradients[-1].isfinite().all()
    assert {key: value.dtype
            for key, value in layer.state_dict().items()} == kinds
    torch.testing.assert_close(*outputs, rtol=.05, atol=.05)
    assert (gradients[0] - gradients[1]).norm() < .03 * gradients[0].norm()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('padding', ['all valid', 'padded'])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', FIXED)
def test_nothing_waits(name, training, padding, kind):
    """Forward and backward, with losses and counters, never wait."""
    layer = build_layer(FIXED[name], widths=(16, 24)).train(training)
    layer.losses = []
    x = images(dim=16).requires_grad_()
    valid = some_padding(padding)
    with accelerated(), NoWaiting():
        with under(getattr(torch, kind)):
            y = layer(x, valid=valid)
        (y.float().square().mean() + sum(
            loss for losses in layer.losses for loss in losses.values())
         ).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('operator', [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(),
    lambda x: bool((x > 0).any()), lambda x: torch.bincount(x.int().abs()),
    lambda x: x.masked_select(x > 0), lambda x: x.unique()])
def test_the_guard_sees_who_waits(operator):
    with pytest.raises(AssertionError, match='waits'), NoWaiting():
        operator(torch.randn(5))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', FIXED)
def test_the_same_input_gives_the_same_bits(name, kind):
    layer = build_layer(FIXED[name], widths=(16, 24))
    x = images(dim=16)
    with accelerated(), under(getattr(torch, kind)):
        first, second = results(layer, x), results(layer, x)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(second[key], value), key


@pytest.mark.torch('2.10')
@pytest.mark.parametrize('padding', ['all valid', 'padded'])
@pytest.mark.parametrize('name', [
    'token choice', 'token choice, capacity', 'expert choice c=2'])
def test_what_a_gpu_leaves_unwritten_reaches_nothing(monkeypatch, name,
                                                     padding):
    """A GPU's kernel does not write the rows behind the last offset, so they
    hold arbitrary values. The CPU's kernel writes zeros there, which would
    hide an error."""
    product = compat.grouped_mm

    def unwritten(*args, offs):
        out = product(*args, offs=offs)
        if out.dim() == 2:
            out[int(offs[-1]):] = float('nan')
        return out

    layer = build_layer(FIXED[name], widths=(16, 24))
    x, valid = images(dim=16), some_padding(padding)
    found = []
    for kernel in (product, unwritten):
        monkeypatch.setattr(compat, 'grouped_mm', kernel)
        with accelerated(), under(torch.bfloat16):
            found.append(results(layer, x, valid))
    for key, value in found[0].items():
        assert value.isfinite().all(), key
        assert torch.equal(found[1][key], value), key


# Operators that may sum rows in half precision, if their result has it.
SUMS = ('sum', 'mean', 'index_add', 'index_add_', 'index_put', 'index_put_',
        'scatter_add', 'scatter_add_', 'repeat_interleave', 'segment_reduce')


class NoHalfSums(TorchDispatchMode):
    """Fails if rows are summed in half precision. The values on a CPU would
    not show it: its kernels round once, while a GPU's atomic additions round
    each time."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        over_rows = name == 'mm' and args[0].shape[1] >= self.num_rows
        if (name in SUMS or over_rows) and out.dtype in (
                torch.bfloat16, torch.float16):
            raise AssertionError(f'{func} sums in {out.dtype}')
        return out


@pytest.mark.parametrize('kind', KINDS[1:])
@pytest.mark.parametrize('name', FIXED)
def test_bias_gradients_are_summed_in_float32(name, kind):
    """The gradients of the core's weights, which are sums over experts, are
    summed in float32 too."""
    layer = build_layer(FIXED[name], widths=(16, 24), **(
        dict(align='none', core=False) if name == 'soft' else
        dict(unrouted='zero')))
    x = images(dim=16).requires_grad_()
    with accelerated():
        with under(getattr(torch, kind)):
            y = layer.mixture(x, None)
        with NoHalfSums(B * S):
            y.sum().backward()


@pytest.mark.torch('2.10')
@pytest.mark.parametrize('name', ['token choice', 'token choice, capacity',
                                  'expert choice'])
def test_the_grouped_product_in_a_graph(monkeypatch, name):
    """A graph traced on the CPU computes in blocks; here it is made to use
    the grouped product, as on a GPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(grouped_mm, 'fits', lambda rows_ND, widths:
                        rows_ND.dtype == torch.bfloat16)
    layer = build_layer(FIXED[name], widths=(16, 24))
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    x = images(dim=16).requires_grad_()
    gradients = []
    for module in (layer, compiled):
        layer.zero_grad()
        with accelerated(), torch.autocast('cpu', torch.bfloat16):
            module(x).square().mean().backward()
        gradients.append(torch.cat([each.grad.flatten()
                                    for each in layer.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < .02 * gradients[0].norm()


BPR = dict(type='TokenChoiceRouter', capacity_factor=1., priority='bpr')
# Operators of a forward and of a backward pass, views and allocations not
# counted: the layer in training, bfloat16 autocast, losses and counters.
# docs/performance.md quotes them.
OPERATORS = {
    'token choice': (dict(type='TokenChoiceRouter'), 45, 70),
    'token choice k=2': (dict(type='TokenChoiceRouter', top_k=2), 55, 70),
    'capacity': (BPR, 80, 90),
    # The core runs on all tokens: nine operators more, those of a dense FFN.
    'capacity, core': (BPR, 84, 90),
    'expert choice': (dict(type='ExpertChoiceRouter'), 80, 90),
    'soft': (dict(type='SoftRouter', slots_per_expert=8), 80, 90),
}


def count_operators(router: dict, **options) -> tuple[int, int]:
    """Count the operators of forward and of backward."""
    layer = MoEFFN(16, 32, 8, router=router, add_identity=False, **options)
    layer.losses = []
    x = torch.randn(2, 32, 16, requires_grad=True)
    with accelerated(), Operators() as forward:
        with torch.autocast('cpu', torch.bfloat16):
            y = layer(x)
    outputs = [y] + [loss for losses in layer.losses
                     for loss in losses.values()]
    grads = [torch.ones_like(output) for output in outputs]
    with accelerated(), Operators() as backward:
        torch.autograd.backward(outputs, grads)
    return forward.total, backward.total


@pytest.mark.torch('2.10')
@pytest.mark.parametrize('name', OPERATORS)
def test_few_operators(name):
    router, forward, backward = OPERATORS[name]
    found = count_operators(router, unrouted=(
        'zero' if name == 'capacity' else None))
    assert found[0] <= forward and found[1] <= backward, found


MODES = pytest.mark.parametrize('training', [True, False])


@pytest.mark.torch('2.6')
@MODES
@pytest.mark.parametrize('name', FIXED)
def test_one_graph_without_recompiling(name, training):
    torch._dynamo.reset()
    layer = build_layer(FIXED[name]).train(training)
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            x = images()
            found, wanted = [], []
            for module, outputs in ((compiled, found), (layer, wanted)):
                torch.manual_seed(step)
                layer.losses = []
                outputs += [module(x), layer.demand_E.clone(),
                            *(loss for losses in layer.losses
                              for loss in losses.values())]
                layer.demand_E.zero_()
                layer.token_counts.zero_()
                layer.kept_E.zero_()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.torch('2.6')
@MODES
def test_padding_in_a_graph(training):
    torch._dynamo.reset()
    layer: MoEFFN = build_layer(FIXED['token choice, capacity'])
    layer.train(training)
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    for kind in ('padded', 'an empty image'):
        x, valid = images(), some_padding(kind)
        torch.testing.assert_close(compiled(x, valid=valid),
                                   layer(x, valid=valid))
