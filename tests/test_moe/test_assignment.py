"""The routing scenario of V-MoE's own tests: three tokens, three experts,
capacity two (2106.05974 and google-research/vmoe)."""
import pytest
import torch

from rmoe import compat
from rmoe.moe import assignment, compute_capacity
from rmoe.moe import rows as rows_module
from rmoe.moe.routing import count_groups

G2 = torch.tensor([[.4, 0., .2], [.5, .1, .4], [.3, .2, .6]])


def choose_experts(scores, k, *args, **options):
    """The served rows of a token-choice assignment."""
    rows, pairs_N = assignment.choose_experts(
        scores, assignment.top_k(scores, k), *args, **options)
    assert torch.equal(pairs_N // k, rows.token_ids_N)
    return rows.without_unserved()


def choose_tokens(scores, capacity, *args):
    most = capacity if isinstance(capacity, int) else int(capacity.max())
    rows, pairs_N = assignment.choose_tokens(scores, capacity, most, *args)
    assert torch.equal(pairs_N % rows.num_tokens, rows.token_ids_N)
    return rows.without_unserved()


def pairs(rows) -> set[tuple[int, int]]:
    """(token, expert) of each row."""
    return set(zip(rows.token_ids_N.tolist(), rows.expert_ids_N.tolist()))


def combined(rows) -> list[dict[int, float]]:
    """For each token, the gate of each expert that kept it."""
    return [{e: G2[t, e].item() for s, e in sorted(pairs(rows)) if s == t}
            for t in range(3)]


def test_top_k_orders_by_score_and_breaks_ties_low():
    scores = torch.tensor([[.2, .5, .5, .1], [.25, .25, .25, .25]])
    assert assignment.top_k(scores, 3).tolist() == [[1, 2, 0], [0, 1, 2]]


@pytest.mark.parametrize('priority, kept', [
    # first come: t1's and t2's second choices find their expert full
    ('first_come', {(0, 0), (0, 2), (1, 0), (2, 2)}),
    # by gate t2 (.6), t1 (.5), t0 (.4): t0's and t2's second choices lose
    ('bpr', {(0, 0), (1, 0), (1, 2), (2, 2)}),
    # by sum t1 (.9 = .5 + .4), t2 (.9 = .6 + .3; equal, so t1 is first or
    # rounding decides), t0 (.6): the same rows
    ('bpr_sum', {(0, 0), (1, 0), (1, 2), (2, 2)}),
])
def test_token_choice_with_two_slots(priority, kept):
    rows = choose_experts(G2, 2, None, 2, 2, priority=priority)
    assert rows.demand_E.tolist() == [3, 0, 3]
    assert rows.counts_E.tolist() == [2, 0, 2]
    assert rows.expert_ids_N.tolist() == [0, 0, 2, 2]
    assert pairs(rows) == kept
    # first come: t0 .4/.2, t1 .5, t2 .6; by priority: t0 .4, t1 .5/.4, t2 .6
    expected = {'first_come': [{0: .4, 2: .2}, {0: .5}, {2: .6}]}.get(
        priority, [{0: .4}, {0: .5, 2: .4}, {2: .6}])
    for found, gates in zip(combined(rows), expected):
        assert found == pytest.approx(gates)


def test_priorities_differ_where_the_sum_and_the_maximum_do():
    # one slot per expert; all want expert 0 first. max: t0, sum: t1
    scores = torch.tensor([[.6, .1, .0], [.5, .0, .4]])
    by_max = choose_experts(scores, 2, None, 1, 1, priority='bpr')
    by_sum = choose_experts(scores, 2, None, 1, 1, priority='bpr_sum')
    assert (0, 0) in pairs(by_max) and (1, 0) in pairs(by_sum)


def test_expert_choice_with_two_slots():
    # columns (.4 .5 .3), (0 .1 .2), (.2 .4 .6)
    rows = choose_tokens(G2[None], 2)
    assert pairs(rows) == {(1, 0), (0, 0), (2, 1), (1, 1), (2, 2), (1, 2)}
    assert rows.counts_E.tolist() == [2, 2, 2]
    for found, gates in zip(combined(rows), (
            {0: .4}, {0: .5, 1: .1, 2: .4}, {1: .2, 2: .6})):
        assert found == pytest.approx(gates)
    # experts per token 1, 3, 2
    assert torch.bincount(rows.token_ids_N).tolist() == [1, 3, 2]


def test_groups_have_their_own_slots():
    # both groups ask expert 0 alone; one slot in the first, two in the second
    scores = torch.tensor([[.9, .1]]).repeat(6, 1)
    rows = choose_experts(scores, 1, None, torch.tensor([1, 2]), 2, 2)
    assert rows.token_ids_N.tolist() == [0, 3, 4]
    assert rows.demand_E.tolist() == [6, 0]
    rows = choose_tokens(scores.view(2, 3, 2), torch.tensor([1, 2]))
    assert rows.token_ids_N.tolist() == [0, 3, 4] * 2


def test_ties_go_to_the_lower_index():
    rows = choose_tokens(torch.ones(2, 5, 3), 2)
    assert rows.token_ids_N.tolist() == [0, 1, 5, 6] * 3
    rows = choose_experts(torch.ones(5, 3), 2, None, 2, 2, priority='bpr')
    assert rows.token_ids_N.tolist() == [0, 1, 0, 1]
    assert rows.expert_ids_N.tolist() == [0, 0, 1, 1]


def test_padding_is_nobodys():
    valid = torch.tensor([True, False, True])
    rows = choose_experts(G2, 2, valid)
    assert pairs(rows) == {(0, 0), (0, 2), (2, 2), (2, 0)}
    rows = choose_tokens(G2[None], 3, valid[None, :, None])
    assert set(rows.token_ids_N.tolist()) == {0, 2}


@pytest.mark.parametrize('count, expected', [
    (2, [False, True, True, False, False]),
    (3, [True, True, True, False, False]),  # of three equals the first
    (0, [False] * 5),
    (5, [True] * 5),
])
def test_largest(count, expected):
    values = torch.tensor([.2, .5, .4, .2, .2])
    for kind in (count, torch.tensor(count)):
        assert assignment.largest(values, kind, count).tolist() == expected


def test_largest_with_a_count_of_its_own_for_each_row():
    values = torch.tensor([[3., 1, 2], [3, 1, 2], [3, 1, 2]])
    taken = assignment.largest(values, torch.tensor([0, 1, 2]), 2)
    assert taken.int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 1]]


def test_rows_of_a_token_are_found():
    # five rows: those of tokens 2, 0, 2 and 1, and an unserved one
    tokens = torch.tensor([2, 0, 2, 1, 0])
    unserved = torch.tensor([False, False, False, False, True])
    order, starts = rows_module.order_by_token(tokens, 4, unserved)
    assert order.tolist() == [1, 3, 0, 2, 4]
    assert starts.tolist()[:5] == [0, 1, 2, 4, 4]
    assert len(starts) == 4 + 5 + 1
    assert rows_module.kept_per_token(starts, 4).tolist() == [1, 1, 2, 0]


@pytest.mark.parametrize('function', ['stable_sort', 'by_falling'])
def test_sorting_for_an_export_is_sorting(monkeypatch, function):
    """For ONNX, which has no stable sort, other operators replace it."""
    values = torch.randint(3, (40, ))
    found = []
    for exporting in (False, True):
        monkeypatch.setattr(compat, 'is_exporting', lambda on=exporting: on)
        if function == 'stable_sort':
            found.append(rows_module.stable_sort(values, 3)[1])
            found.append(rows_module.starts_of(values.sort().values, 4))
        else:
            found += [rows_module.by_falling(values.float())] * 2
    assert torch.equal(found[0], found[2]) and torch.equal(*found[1::2])


@pytest.mark.parametrize('priority', assignment.PRIORITIES)
@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('k', [1, 3])
def test_rows_of_token_choice(priority, groups, k):
    """Shapes do not depend on scores, and unserved rows come last."""
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


@pytest.mark.parametrize('rows, experts, factor, multiple, expected', [
    (32 * 2, 32, 1., 4, 4),  # two rounded up to a multiple of four
    (128, 32, 2., 4, 8),
    (32 * 2, 32, 1., 1, 2),
    (0, 8, 1., 1, 1),
    (3, 8, 0.1, 1, 1),  # less than a token: one slot all the same
    (800, 8, 1.1, 1, 110),  # 1.1 * 100 is 110.00000000000001
])
def test_compute_capacity(rows, experts, factor, multiple, expected):
    assert compute_capacity(rows, experts, factor, multiple) == expected


def test_compute_capacity_refuses_zero():
    with pytest.raises(ValueError, match='capacity_factor=0 '):
        compute_capacity(8, 2, 0)


@pytest.mark.parametrize('images, group, expected', [
    (6, 'image', 6), (6, 'batch', 1), (6, 2, 3), (6, 6, 1), (0, 4, 1),
])
def test_count_groups(images, group, expected):
    assert count_groups(images, group) == expected


def test_groups_that_do_not_divide_the_batch():
    with pytest.raises(ValueError, match=r'group=4 .* batch of 6.*divisor'):
        count_groups(6, 4)
