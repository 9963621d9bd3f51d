"""E experts into another number, on hand-made experts."""
import pytest
import torch

from rmoe.upcycling.expert_count import choose_groups, regroup


@pytest.mark.parametrize('how, count, groups', [
    ('tile', 6, [[0], [1], [2], [3], [0], [1]]), ('tile', 2, [[0], [1]]),
    ('slice', 3, [[0], [1], [2]])])
def test_tile_and_slice(how, count, groups):
    assert choose_groups(how, torch.zeros(4, 1), count) == groups


def test_prune_drops_the_least_loaded_and_keeps_the_order():
    loads = torch.tensor([5., 0., 9., 5.])
    assert choose_groups('prune', torch.zeros(4, 1), 2, loads) == [[0], [2]]
    # of equals the first stays
    assert choose_groups('prune', torch.zeros(4, 1), 1, torch.ones(4)) == [[0]]


def test_merge_joins_what_is_close():
    # on a line at 0, 10, 11, 3: first 1 and 2 (distance 1), then 0 and 3
    experts = 1e6 + torch.tensor([[0.], [10.], [11.], [3.]])
    assert choose_groups('merge', experts, 3) == [[0], [1, 2], [3]]
    assert choose_groups('merge', experts, 2) == [[0, 3], [1, 2]]
    assert choose_groups('merge', experts, 1) == [[0, 3, 1, 2]]
    assert choose_groups('merge', experts, 4) == [[0], [1], [2], [3]]


@pytest.mark.parametrize('how', ['slice', 'merge', 'prune'])
def test_only_tile_makes_more(how):
    with pytest.raises(ValueError, match=r"cannot make 8 .* of 4: use 'tile'"):
        choose_groups(how, torch.zeros(4, 1), 8, torch.ones(4))


def test_regroup_takes_the_mean_along_whatever_axis_is_stacked():
    groups = [[0, 3], [1]]
    stacked = torch.randn(4, 3, 2)
    expected = torch.stack(((stacked[0] + stacked[3]) / 2, stacked[1]))
    torch.testing.assert_close(regroup(stacked, (2, 3, 2), groups, 4),
                               expected)
    # an axis of E x 3 slots, experts first
    slots = stacked.flatten(0, 1).t().contiguous()
    torch.testing.assert_close(regroup(slots, (2, 6), groups, 4),
                               expected.flatten(0, 1).t())
    assert regroup(stacked.half(), (2, 3, 2), groups, 4).dtype == torch.half


@pytest.mark.parametrize('shape', [(2, 3, 4), (3, 3, 2), (2, 3), (4, 3, 2)])
def test_regroup_changes_nothing_but_the_count(shape):
    with pytest.raises(ValueError, match=r'\(4, 3, 2\) cannot become'):
        regroup(torch.randn(4, 3, 2), shape, [[0], [1]], 4)
