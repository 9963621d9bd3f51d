"""What an accelerator runs computes what the CPU runs, whatever the load, and
waits for nothing."""
import itertools
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from accelerator import NoWaiting, Operators, accelerated
from hypothesis import given
from hypothesis import strategies as st
from routers import ROUTERS, B, D, E, S, build_layer, images, route
from torch.utils._python_dispatch import TorchDispatchMode

from rmoe import compat
from rmoe.moe import MoEFFN, assignment, blocks, grouped_mm
from rmoe.moe.rows import Rows

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


# The CPU's autocast took bfloat16 alone.
FLOAT16 = pytest.mark.torch('2.4')
KINDS = ['float32', 'bfloat16', pytest.param('float16', marks=FLOAT16)]


def under(dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to that type; float32 is none."""
    return (nullcontext() if dtype == torch.float32
            else torch.autocast('cpu', dtype))


def results(layer, x, valid=None) -> dict[str, torch.Tensor]:
    """Output, losses, counters and every gradient of one training step."""
    torch.manual_seed(1)  # of the router's noise
    x = x.clone().requires_grad_()
    layer.losses = []
    layer.zero_grad()
    for counter in (layer.demand_E, layer.kept_E, layer.token_counts):
        counter.zero_()
    y = layer(x, valid=valid)
    losses = {f'loss {i} {name}': loss
              for i, found in enumerate(layer.losses)
              for name, loss in found.items()}
    if valid is not None:
        y = y.masked_fill(~valid[..., None], 0)
    (y.square().mean() + sum(losses.values())).backward()
    gradients = {f'gradient of {name}': parameter.grad.clone()
                 for name, parameter in layer.named_parameters()
                 if parameter.grad is not None}
    return {'y': y.detach(), 'x': x.grad, 'demand': layer.demand_E.clone(),
            'kept': layer.kept_E.clone(), 'tokens': layer.token_counts.clone(),
            **losses, **gradients}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6,
                                   msg=lambda text, name=name:
                                   f'{name}: {text}')


def options_of(router: dict):
    """Every align and unrouted that goes with a router."""
    if router['type'] == 'SoftRouter':
        return [dict(align='difference'), dict(align='none', core=False)]
    return [dict(align=align, unrouted=unrouted, core=core)
            for align, (unrouted, core) in itertools.product(
                ('stopgrad', 'none', 'renormalize'),
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
        # With 'core' or a difference to it, padding goes through the core.
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


LOADS = {
    'all to one': [1, 1, 1, 1],
    'two are empty': [0, 3, 0, 3],
    'unequal': [0, 1, 1, 1, 1, 1, 1, 2, 3],
}


@pytest.mark.parametrize('smallest', [1, 2, 128])
@pytest.mark.parametrize('load', LOADS)
@pytest.mark.parametrize('rank', [None, 2])
def test_every_load(monkeypatch, load, rank, smallest):
    """Experts are read off the tokens: the router is an identity."""
    monkeypatch.setattr(blocks, 'SMALLEST_BLOCK', smallest)
    layer = build_layer(ROUTERS['token choice'], rank=rank)
    with torch.no_grad():
        layer.router.scorer.weight.copy_(9 * torch.eye(E, D))
    wanted = torch.tensor(LOADS[load]).repeat(10)[:B * S].view(B, S)
    x = images()
    x[..., :E] = torch.nn.functional.one_hot(wanted, E)
    counts = torch.bincount(wanted.flatten(), minlength=E)
    assert route(layer, x).counts_E.tolist() == counts.tolist()
    wanted = results(layer, x)
    with accelerated():
        assert_same(results(layer, x), wanted)


@pytest.mark.parametrize('tokens', [0, 1, 3])
@pytest.mark.parametrize('name', FIXED)
def test_more_experts_than_tokens(name, tokens):
    layer = build_layer(FIXED[name], num_experts=16)
    x = images(1, tokens)
    wanted = results(layer, x)
    with accelerated():
        assert_same(results(layer, x), wanted)


@pytest.mark.parametrize('priority', assignment.PRIORITIES)
@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('k', [1, 3])
def test_rows_of_token_choice(priority, groups, k):
    """Shapes do not depend on scores; rows that nobody serves come last."""
    sizes = set()
    for _ in range(5):
        # few values: many ties, in choices and in priorities
        scores = torch.randint(4, (12, 5)).float()
        rows, pairs_N = assignment.choose_experts(
            scores, assignment.top_k(scores, k), torch.rand(12) < .8,
            torch.tensor([2, 1, 3])[:groups], 3, groups, priority)
        served = int(rows.counts_E.sum())
        assert rows.max_rows == min(12 * k, 3 * groups)
        assert not rows.unserved_N[:served].any()
        assert rows.unserved_N[served:].all()
        assert rows.ends_E.tolist() == rows.counts_E.cumsum(0).tolist()
        assert (rows.expert_ids_N[:served] == torch.arange(5)
                .repeat_interleave(rows.counts_E)).all()
        assert (rows.lonely_T == (rows.kept_per_token() == 0)).all()
        assert len(set(pairs_N.tolist())) == len(pairs_N)
        sizes.add(len(pairs_N))
    assert sizes == {min(12 * k, 5 * rows.max_rows)}


def test_what_cannot_be_served_is_cut_off():
    """A lower capacity is less work: 12 tokens, 2 slots at 3 experts."""
    scores = torch.rand(12, 3)
    rows, _ = assignment.choose_experts(scores, assignment.top_k(scores, 1),
                                        None, 2, 2)
    assert len(rows.token_ids_N) == 6 and rows.max_rows == 2


@pytest.mark.parametrize('masked', [False, True])
def test_rows_of_expert_choice(masked):
    scores = torch.randint(3, (2, 6, 4)).float()
    allowed = torch.rand(2, 6, 1) < .6 if masked else None
    rows, pairs_N = assignment.choose_tokens(scores, torch.tensor([3, 2]), 3,
                                             allowed)
    served = int(rows.counts_E.sum())
    assert len(pairs_N) == 4 * 2 * 3 and rows.max_rows == 6
    assert rows.unserved_N.tolist() == [
        row >= served for row in range(len(pairs_N))]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9),
       st.integers(0, 5), st.integers(1, 12), st.booleans())
def test_blocks_hold_every_row_once(counts, spare, smallest, bounded):
    num_rows = max(sum(counts) + spare, 1)
    most = max(max(counts), 1) if bounded else num_rows
    counts_E = torch.tensor(counts, dtype=torch.int32)
    expert_of = [e for e, count in enumerate(counts) for _ in range(count)]
    unserved = [0] * (num_rows - len(expert_of))
    rows = Rows(torch.zeros(num_rows), torch.tensor(expert_of + unserved),
                counts_E, counts_E.cumsum(0, dtype=torch.int32), counts_E,
                num_tokens=1, max_rows=most)
    default, blocks.SMALLEST_BLOCK = blocks.SMALLEST_BLOCK, smallest
    try:
        plan = blocks.lay_out(rows)
    finally:
        blocks.SMALLEST_BLOCK = default
    size = len(plan.row_P) // len(plan.expert_J)
    found = plan.row_P[~plan.empty_P].tolist()
    assert found == list(range(sum(counts)))
    experts = plan.expert_J.repeat_interleave(size)[~plan.empty_P]
    assert experts.tolist() == expert_of
    places = plan.place_N[:sum(counts)]
    assert not plan.empty_P[places].any()
    assert plan.row_P[places].tolist() == found


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_products_stay_within_the_bound(num_rows, num_experts):
    count, size = blocks.layout(num_rows, num_experts, num_rows)
    assert count * size < 2 * num_rows + num_experts
    if num_rows > num_experts * blocks.SMALLEST_BLOCK * (
            blocks.BLOCKS_PER_EXPERT):
        assert count * size < 1.25 * num_rows + num_experts
    # where loads are bounded by their fair share nothing is wasted
    fair = -(-num_rows // num_experts)
    count, size = blocks.layout(num_rows, num_experts, fair)
    assert count * size <= num_experts * fair


def test_a_router_that_cannot_be_traced_says_so(monkeypatch):
    layer = build_layer(ROUTERS['sparse expert choice'])
    monkeypatch.setattr(compat, 'is_compiling', lambda: True)
    with pytest.raises(ValueError, match='SparseExpertChoiceRouter cannot'
                       r' be compiled.*SinkhornExpertChoiceRouter'):
        layer(images())


@pytest.mark.parametrize('name', FIXED)
def test_bfloat16_is_routed_in_float32(name):
    """In pure bfloat16 and under autocast, routers decide as a float32
    router of the same weights does on the same tokens."""
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
    """Widths of a multiple of eight fit the grouped product."""
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
    """Forward and backward, with losses and counters."""
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


# What may add rows up, if its result is half precision.
SUMS = ('sum', 'mean', 'index_add', 'index_add_', 'index_put', 'index_put_',
        'scatter_add', 'scatter_add_', 'repeat_interleave', 'segment_reduce')


class NoHalfSums(TorchDispatchMode):
    """Fails where rows are summed in half precision. A CPU's kernels round
    once, a GPU's atomic additions round each: values would not tell."""

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
    """So are the core's weights over experts, which follow from the same."""
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
    """On the CPU a trace takes blocks; on a GPU it takes this."""
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


# Operators of a forward and of a backward pass, views and allocations not
# counted: the layer in training, bfloat16 autocast, losses and counters.
# docs/performance.md quotes them.
OPERATORS = {
    'token choice': (dict(type='TokenChoiceRouter'), 45, 70),
    'token choice k=2': (dict(type='TokenChoiceRouter', top_k=2), 55, 70),
    'capacity': (dict(type='TokenChoiceRouter', capacity_factor=1.,
                      priority='bpr'), 80, 90),
    'expert choice': (dict(type='ExpertChoiceRouter'), 80, 90),
    'soft': (dict(type='SoftRouter', slots_per_expert=8), 80, 90),
}


def count_operators(router: dict, **options) -> tuple[int, int]:
    """Of forward and backward."""
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
