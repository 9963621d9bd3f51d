"""Random states of several ranks."""
import pytest
import torch

from rmoe.engine import random_state as module
from rmoe.engine.random_state import own_state, random_state, separate_ranks


def at_rank(monkeypatch, rank, world):
    monkeypatch.setattr(module, 'get_rank', lambda: rank)
    monkeypatch.setattr(module, 'get_world_size', lambda: world)


def draw(state):
    generator = torch.Generator()
    generator.set_state(state['cpu'])
    return tuple(torch.rand(4, generator=generator).tolist())


@pytest.mark.parametrize('rank', [0, 1])
def test_each_rank_goes_on_from_its_own(monkeypatch, rank):
    at_rank(monkeypatch, rank, 2)
    states = [dict(cpu=torch.zeros(1)), dict(cpu=torch.ones(1))]
    assert own_state(states) is states[rank]


@pytest.mark.parametrize('saved', [1, 2, 8])
def test_no_two_ranks_go_on_alike_when_their_number_changes(monkeypatch,
                                                            saved):
    states = [dict(cpu=torch.Generator().manual_seed(seed).get_state())
              for seed in range(saved)]
    drawn = []
    for rank in range(4):
        at_rank(monkeypatch, rank, 4)
        drawn.append(draw(own_state(states)))
        assert drawn[-1] == draw(own_state(states))
    assert len(set(drawn)) == 4
    assert drawn[0] == draw(states[0])
    assert not {draw(state) for state in states[1:]} & set(drawn)


def test_ranks_are_separated_and_the_first_stays(monkeypatch):
    drawn = []
    for rank in range(4):
        torch.manual_seed(0)
        at_rank(monkeypatch, rank, 4)
        separate_ranks()
        drawn.append(draw(random_state()))
    assert len(set(drawn)) == 4
    torch.manual_seed(0)
    assert drawn[0] == tuple(torch.rand(4).tolist())
