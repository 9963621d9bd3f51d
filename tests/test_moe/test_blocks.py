"""Blocks hold every row once, whatever the load."""
import pytest
import torch
from accelerator import accelerated, assert_same, results
from hypothesis import given
from hypothesis import strategies as st
from routers import ROUTERS, B, D, E, S, build_layer, images, route

from rmoe.moe import blocks
from rmoe.moe.rows import Rows

LOADS = {
    'all to one': [1, 1, 1, 1],
    'two are empty': [0, 3, 0, 3],
    'unequal': [0, 1, 1, 1, 1, 1, 1, 2, 3],
}


@pytest.mark.parametrize('smallest', [1, 2, 128])
@pytest.mark.parametrize('load', LOADS)
@pytest.mark.parametrize('rank', [None, 2])
def test_every_load(monkeypatch, load, rank, smallest):
    """The router is an identity, so the first E channels of a token choose its
    expert."""
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
