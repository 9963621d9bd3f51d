"""Properties that every router has on any input, tested on random ones."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routers import ROUTERS, SPARSE, D, build_layer

from rmoe.moe import assignment

quick = settings(max_examples=20, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5))
seeds = st.integers(0, 2**31 - 1)


def draw_tokens(seed, images, tokens, coarse):
    """Random tokens. Coarse ones have few different values, so that there are
    many ties."""
    generator = torch.Generator().manual_seed(seed)
    if coarse:
        return torch.randint(-1, 2, (images, tokens, D), generator=generator
                             ).float()
    return torch.randn(images, tokens, D, generator=generator)


def build(name, experts, seed):
    router = dict(ROUTERS[name])
    if 'top_k' in router:
        router['top_k'] = min(router['top_k'], experts)
    torch.manual_seed(seed)
    return build_layer(router, num_experts=experts).router


def route(router, x, valid=None):
    return router(x.reshape(-1, D), valid, len(x))


@pytest.mark.filterwarnings('ignore:the k-sparse plan')
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', SPARSE)
@quick
@given(size=sizes, seed=seeds, coarse=st.booleans(), padded=st.booleans())
def test_sparse(name, training, size, seed, coarse, padded):
    images, tokens, experts = size
    router = build(name, experts, seed).train(training)
    x = draw_tokens(seed, images, tokens, coarse)
    valid = None
    if padded:
        valid = torch.rand(images * tokens) > .4
    routing = route(router, x, valid)
    dispatch, combine = routing.dispatch_tensor(), routing.combine_tensor()
    # a slot holds one token, a token is in an expert once
    assert ((dispatch == 0) | (dispatch == 1)).all()
    assert (dispatch.sum(0) <= 1).all() and (dispatch.sum(2) <= 1).all()
    assert combine.isfinite().all() and (combine >= 0).all()
    assert (combine[dispatch == 0] == 0).all()
    assert routing.counts_E.sum() == len(routing.served().token_ids_N)
    assert len(routing.token_ids_N) == len(routing.weights_N)
    assert (routing.counts_E <= routing.demand_E).all()
    if valid is not None:
        assert (dispatch[~valid] == 0).all()
    factor = router._factor() if hasattr(router, '_factor') else None
    if factor is not None:
        taken = dispatch.sum(2).view(images, tokens, experts).sum(1)
        groups = (torch.ones(images, tokens) if valid is None
                  else valid.view(images, tokens)).sum(1)
        for image, count in enumerate(groups.int().tolist()):
            assert taken[image].max() <= router._slots(
                *((count, factor) if hasattr(router, 'top_k')
                  else (count, )))


@quick
@given(size=sizes, seed=seeds, coarse=st.booleans())
def test_soft(size, seed, coarse):
    images, tokens, experts = size
    routing = route(build('soft', experts, seed),
                    draw_tokens(seed, images, tokens, coarse))
    for weights, axis in ((routing.dispatch_GSN, 1), (routing.combine_GSN, 2)):
        assert weights.isfinite().all() and (weights >= 0).all()
        torch.testing.assert_close(weights.sum(axis),
                                   torch.ones_like(weights.sum(axis)))


@pytest.mark.filterwarnings('ignore:the k-sparse plan')
# The router left out gives its slots in the order of the tokens. There are two
# experts or more: with one, all scores are equal, and ties are broken by the
# position of the tokens.
@pytest.mark.parametrize('name', [
    name for name in ROUTERS if name != 'sinkhorn token choice, plan'])
@quick
@given(size=st.tuples(st.integers(1, 3), st.integers(1, 12),
                      st.integers(2, 5)), seed=seeds)
def test_permuted_tokens_permute_the_result(name, size, seed):
    images, tokens, experts = size
    router = build(name, experts, seed)
    x = draw_tokens(seed, images, tokens, coarse=False)
    order = torch.randperm(tokens)
    plain = route(router, x)
    permuted = route(router, x[:, order])

    def per_token(routing):
        gates = routing.combine_tensor().sum(2)
        return gates.view(images, tokens, experts)

    torch.testing.assert_close(per_token(permuted), per_token(plain)[:, order],
                               atol=1e-5, rtol=1e-4)


@quick
@given(st.integers(1, 30), seeds, st.integers(0, 31), st.booleans())
def test_largest_equals_a_stable_sort(length, seed, count, coarse):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(3, length, generator=generator)
    if coarse:
        values = (4 * values).round()
    count = min(count, length)
    order = torch.sort(values, descending=True, stable=True).indices
    expected = torch.zeros_like(values, dtype=torch.bool).scatter(
        1, order[:, :count], True)
    for kind in (count, torch.tensor(count)):
        found = assignment.largest(values, kind, max(count, 1))
        assert torch.equal(found, expected)
