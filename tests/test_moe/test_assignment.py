"""The routing scenario of V-MoE's own tests: three tokens, three experts,
capacity two (2106.05974 and google-research/vmoe)."""
import pytest
import torch

from rmoe.moe import assignment, compute_capacity

G2 = torch.tensor([[.4, 0., .2], [.5, .1, .4], [.3, .2, .6]])


def test_top_k_orders_by_score_and_breaks_ties_low():
    scores = torch.tensor([[.2, .5, .5, .1], [.25, .25, .25, .25]])
    assert assignment.top_k(scores, 3).tolist() == [[1, 2, 0], [0, 1, 2]]


@pytest.mark.parametrize('batch_priority, kept', [
    # first come: t1's and t2's second choices find their expert full
    (False, {(0, 0), (0, 2), (1, 0), (2, 2)}),
    # by gate t2 (.6), t1 (.5), t0 (.4): t0's and t2's second choices lose
    (True, {(0, 0), (1, 0), (1, 2), (2, 2)}),
])
def test_capacity_and_priority(batch_priority, kept):
    choices = assignment.top_k(G2, 2)
    order = assignment.fill_order(
        G2.amax(1) if batch_priority else None, choices)
    flat = choices.flatten()
    grouped, demand = assignment.group_by_expert(flat[order], 3)
    rows, counts = assignment.limit_to_capacity(grouped, demand, 2)
    rows = order[rows]
    assert demand.tolist() == [3, 0, 3] and counts.tolist() == [2, 0, 2]
    assert {(int(r) // 2, int(flat[r])) for r in rows} == kept


def test_group_by_expert_is_stable_and_leaves_out_padding():
    ids = torch.tensor([2, 0, 3, 2, 0, 3, 1])
    order, counts = assignment.group_by_expert(ids, 3)
    assert order.tolist() == [1, 4, 6, 0, 3]
    assert counts.tolist() == [2, 1, 2]


@pytest.mark.parametrize('rows, experts, factor, multiple, expected', [
    (32 * 2, 32, 1., 4, 4),  # two rounded up to a multiple of four
    (128, 32, 2., 4, 8),
    (32 * 2, 32, 1., 1, 2),
    (0, 8, 1., 1, 1),
])
def test_compute_capacity(rows, experts, factor, multiple, expected):
    assert compute_capacity(rows, experts, factor, multiple) == expected


def test_compute_capacity_refuses_zero():
    with pytest.raises(ValueError, match='capacity_factor=0 '):
        compute_capacity(8, 2, 0)
