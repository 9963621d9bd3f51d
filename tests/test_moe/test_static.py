"""The static path computes what the default one does, whatever the load."""
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routers import ROUTERS, B, D, E, S, build_layer, images, route

from rmoe import compat
from rmoe.moe import MoEFFN, assignment, static

STATIC = {name: router for name, router in ROUTERS.items()
          if not name.startswith('sparse')}
STATIC['token choice, first come'] = dict(
    type='TokenChoiceRouter', noise_std=0., top_k=2, capacity_factor=.7,
    eval_capacity_factor=.7, capacity_multiple=1)
STATIC['token choice, by sum'] = dict(
    STATIC['token choice, capacity'], priority='bpr_sum', group='batch',
    eval_group='batch')
STATIC['token choice, tutel'] = dict(
    STATIC['token choice, first come'], tutel_compat=True, noise_std=1.,
    capacity_factor=1.)
STATIC['every loss'] = dict(
    type='TokenChoiceRouter', noise_std=0.,
    loss_weights=dict(importance=1., gshard=1., z=1.))
STATIC['expert choice, batch'] = dict(
    STATIC['expert choice c=2'], group='batch', eval_group='batch')


@pytest.fixture
def tracing(monkeypatch):
    """Switch the static path on and off without a tracer."""
    def switch(on: bool) -> None:
        monkeypatch.setattr(compat, 'is_compiling', lambda: on)
    return switch


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
@pytest.mark.parametrize('name', STATIC)
def test_static_is_eager(tracing, name, padding):
    valid = some_padding(padding)
    for options in options_of(STATIC[name]):
        layer = build_layer(STATIC[name], **options)
        x = images()
        # With 'core' or a difference to it, padding goes through the core.
        if valid is not None and layer.unrouted == 'zero' and (
                layer.align != 'difference'):
            x[~valid] = float('nan')
        tracing(False)
        wanted = results(layer, x, valid)
        tracing(True)
        assert_same(results(layer, x, valid), wanted)
        layer.eval()
        with torch.no_grad():
            y = layer(x, valid=valid)
            tracing(False)
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
def test_every_load(tracing, monkeypatch, load, rank, smallest):
    """Experts are read off the tokens: the router is an identity."""
    monkeypatch.setattr(static, 'SMALLEST_BLOCK', smallest)
    layer = build_layer(ROUTERS['token choice'], rank=rank)
    with torch.no_grad():
        layer.router.scorer.weight.copy_(9 * torch.eye(E, D))
    wanted = torch.tensor(LOADS[load]).repeat(10)[:B * S].view(B, S)
    x = images()
    x[..., :E] = torch.nn.functional.one_hot(wanted, E)
    counts = torch.bincount(wanted.flatten(), minlength=E)
    for on in (True, False):
        tracing(on)
        routing = route(layer, x)
        assert routing.counts_E.tolist() == counts.tolist()
    tracing(False)
    found = results(layer, x)
    tracing(True)
    assert_same(results(layer, x), found)


@pytest.mark.parametrize('tokens', [1, 3])
@pytest.mark.parametrize('name', STATIC)
def test_more_experts_than_tokens(tracing, name, tokens):
    layer = build_layer(STATIC[name], num_experts=16)
    x = images(1, tokens)
    tracing(False)
    wanted = results(layer, x)
    tracing(True)
    assert_same(results(layer, x), wanted)


@pytest.mark.parametrize('priority', assignment.PRIORITIES)
@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('k', [1, 3])
def test_rows_of_token_choice(tracing, priority, groups, k):
    # few values: many ties, in choices and in priorities
    scores = torch.randint(4, (12, 5)).float()
    valid = torch.rand(12) < .8
    capacity = torch.tensor([2, 1, 3])[:groups]
    tracing(False)
    wanted = assignment.choose_experts(scores, k, valid, capacity, priority)
    tracing(True)
    rows = assignment.choose_experts(scores, k, valid, capacity, priority, 3)
    served = assert_rows(rows, wanted)
    assert len(rows.token_ids_N) == 12 * k > served
    assert rows.max_rows == min(12 * k, 3 * groups)
    assert not rows.complete


@pytest.mark.parametrize('masked', [False, True])
def test_rows_of_expert_choice(tracing, masked):
    scores = torch.randint(3, (2, 6, 4)).float()
    allowed = torch.rand(2, 6, 1) < .6 if masked else None
    capacity = torch.tensor([3, 2])
    tracing(False)
    wanted = assignment.choose_tokens(scores, capacity, allowed)
    tracing(True)
    rows = assignment.choose_tokens(scores, capacity, allowed, 3)
    assert_rows(rows, wanted)
    assert len(rows.token_ids_N) == 4 * 2 * 3 and rows.max_rows == 6


def assert_rows(rows, wanted) -> int:
    """The served rows are the wanted ones; says how many there are."""
    served = int(rows.counts_E.sum())
    assert rows.counts_E.tolist() == wanted.counts_E.tolist()
    assert rows.demand_E.tolist() == wanted.demand_E.tolist()
    assert len(wanted.token_ids_N) == served
    experts = rows.expert_ids_N[:served].tolist()
    assert experts == wanted.expert_ids_N.tolist()
    assert (sorted(zip(experts, rows.token_ids_N.tolist())) ==
            sorted(zip(experts, wanted.token_ids_N.tolist())))
    return served


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9),
       st.integers(0, 5), st.integers(1, 12), st.booleans())
def test_blocks_hold_every_row_once(counts, spare, smallest, bounded):
    num_rows = max(sum(counts) + spare, 1)
    most = max(max(counts), 1) if bounded else num_rows
    default, static.SMALLEST_BLOCK = static.SMALLEST_BLOCK, smallest
    try:
        blocks = static.lay_out(torch.tensor(counts), num_rows, most)
    finally:
        static.SMALLEST_BLOCK = default
    size = len(blocks.row_P) // len(blocks.expert_J)
    rows = blocks.row_P[blocks.filled_P].tolist()
    assert rows == list(range(sum(counts)))
    expert_of = [e for e, count in enumerate(counts) for _ in range(count)]
    experts = blocks.expert_J.repeat_interleave(size)[blocks.filled_P]
    assert experts.tolist() == expert_of
    places = blocks.place_N[:sum(counts)]
    assert blocks.filled_P[places].all()
    assert blocks.row_P[places].tolist() == rows


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_products_stay_within_the_bound(num_rows, num_experts):
    count, size = static.layout(num_rows, num_experts, num_rows)
    assert count * size < 2 * num_rows + num_experts
    if num_rows > num_experts * static.SMALLEST_BLOCK * (
            static.BLOCKS_PER_EXPERT):
        assert count * size < 1.25 * num_rows + num_experts
    # where loads are bounded by their fair share nothing is wasted
    fair = -(-num_rows // num_experts)
    count, size = static.layout(num_rows, num_experts, fair)
    assert count * size <= num_experts * fair


def test_a_router_that_cannot_be_static_says_so(tracing):
    layer = build_layer(ROUTERS['sparse expert choice'])
    tracing(True)
    with pytest.raises(ValueError, match='SparseExpertChoiceRouter cannot'
                       r' be compiled.*SinkhornExpertChoiceRouter'):
        layer(images())


@pytest.mark.parametrize('static_path', [False, True])
@pytest.mark.parametrize('name', STATIC)
def test_bfloat16_is_routed_in_float32(tracing, name, static_path):
    """In pure bfloat16 and under autocast, routers decide as a float32
    router of the same weights does on the same tokens."""
    tracing(static_path)
    layer = build_layer(STATIC[name]).bfloat16().eval()
    x = images().bfloat16()
    found = route(layer, x)
    exact = build_layer(STATIC[name], randomise=False).eval()
    exact.load_state_dict(layer.state_dict())
    wanted = route(exact, x.float())
    with torch.autocast('cpu', torch.bfloat16):
        under_autocast = route(exact, x)
    for routing in (found, under_autocast):
        for key, value in vars(wanted).items():
            if isinstance(value, torch.Tensor):
                assert getattr(routing, key).dtype == value.dtype, key
                assert torch.equal(getattr(routing, key), value), key


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('name', STATIC)
def test_bfloat16_static_is_eager(tracing, name, autocast):
    layer = build_layer(STATIC[name])
    x = images()
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    kinds = {key: value.dtype for key, value in layer.state_dict().items()}
    outputs, gradients = [], []
    for on in (False, True):
        tracing(on)
        torch.manual_seed(1)
        layer.zero_grad()
        layer.losses = []
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
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


MODES = pytest.mark.parametrize('training', [True, False])


@pytest.mark.torch('2.6')
@MODES
@pytest.mark.parametrize('name', STATIC)
def test_one_graph_without_recompiling(name, training):
    torch._dynamo.reset()
    layer = build_layer(STATIC[name]).train(training)
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
    layer: MoEFFN = build_layer(STATIC['token choice, capacity'])
    layer.train(training)
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    for kind in ('padded', 'an empty image'):
        x, valid = images(), some_padding(kind)
        torch.testing.assert_close(compiled(x, valid=valid),
                                   layer(x, valid=valid))
