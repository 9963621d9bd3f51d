"""mmengine's runner with sharded parameters does what it does with DDP."""
from pathlib import Path

import pytest
import torch
from sharded_ranks import overlap, train_by_runner
from toy import toy_model
from two_ranks import run_two_ranks

from rmoe.engine.roles import role_of

pytestmark = pytest.mark.torch('2.8')
WRAPPERS = {
    'whole': dict(type='rmoe.DistributedDataParallel'),
    'sharded': dict(type='rmoe.FullySharded'),
    'experts': dict(type='rmoe.FullySharded', shard=1, expert_parallel=2),
    'both': dict(type='rmoe.FullySharded', expert_parallel=2)}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    work = tmp_path_factory.mktemp('runs')
    torch.save(dict(state_dict=toy_model().state_dict(), meta={}),
               work / 'start.pth')
    return work, run_two_ranks(train_by_runner, str(work), WRAPPERS)


def read(work: Path, name: str, step: int) -> dict:
    return torch.load(work / name / f'iter_{step}.pth', weights_only=True)


@pytest.mark.parametrize('name', ['sharded', 'experts', 'both'])
def test_every_stage_learns_the_same(trained, name):
    work, ranks = trained
    for step in (2, 5, 8):
        whole, other = read(work, 'whole', step), read(work, name, step)
        assert other['meta']['rmoe'] == whole['meta']['rmoe']
        for part in ('state_dict', 'ema_state_dict'):
            assert list(other[part]) == list(whole[part])
            for key, value in whole[part].items():
                torch.testing.assert_close(
                    other[part][key], value, atol=2e-5, rtol=1e-5,
                    msg=lambda text, at=(step, key): f'{at}: {text}')
        state = whole['optimizer']['state']
        assert other['optimizer']['state'].keys() == state.keys()
        for index, moments in state.items():
            for key, value in moments.items():
                torch.testing.assert_close(
                    other['optimizer']['state'][index][key], value,
                    atol=2e-5, rtol=1e-5)
    for rank in ranks:
        for key, value in rank['whole'].items():
            assert rank[name][key] == pytest.approx(value, abs=1e-4), key


@pytest.mark.parametrize('name', WRAPPERS)
def test_what_is_frozen_stays_to_the_bit(trained, name):
    work, _ = trained
    # EMAHook saves the averages as the model, and the model as theirs.
    states = {step: read(work, name, step)['ema_state_dict']
              for step in (1, 2, 4, 5, 8)}
    still = {(1, 2): {'residual', 'router'}, (2, 4): {'core'},
             (5, 8): set()}
    for (begin, end), roles in still.items():
        moved = {role_of(key) for key, value in states[begin].items()
                 if key.startswith('module.') and
                 not torch.equal(value, states[end][key])}
        assert moved == {'core', 'residual', 'router', 'head'} - roles


def test_the_core_computes_while_rows_travel(tmp_path):
    for seen in run_two_ranks(overlap, str(tmp_path)):
        assert seen == ['AsyncCollectiveTensor', 'core'] * 2
