"""Between DTensors and whole tensors, and copies of sharded models."""
import pytest
import torch
from sharded_cases import cut_and_join, lay_out
from sharded_toy import EMA, PLAIN, run_jobs
from toy import BACKBONE, ToySegmentor
from two_ranks import run_two_ranks

from rmoe.parallel.state import accept_full_tensors

pytestmark = pytest.mark.torch('2.8')


def test_whole_tensors_load_into_every_layout(tmp_path):
    torch.manual_seed(1)
    moe, dense = ToySegmentor(PLAIN), ToySegmentor(dict(PLAIN, moe=None))
    for model in (moe, dense):
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.normal_()
    states = dict(moe=moe.state_dict(), dense=dense.state_dict())
    ranks = run_two_ranks(lay_out, str(tmp_path), states)
    for experts in (1, 2):
        for twin in (False, True):
            found = ranks[0]['moe', experts, twin]
            for key, value in states['moe'].items():
                assert torch.equal(found['state_dict'][key], value), key
            # Upcycled: cores from the file, residuals zero, and routers kept.
            upcycled = ranks[0]['dense', experts, twin]
            for key, value in upcycled['state_dict'].items():
                expected = states['dense'].get(key, states['moe'][key])
                if 'residual' in key:
                    expected = torch.zeros_like(expected)
                assert torch.equal(value, expected), key
            assert torch.equal(upcycled['list'][0],
                               states['dense']['head.bias'])
            # Other ranks keep nothing whole.
            assert all(value is None or 'position' in key for key, value in
                       ranks[1]['moe', experts, twin]['state_dict'].items())
        for rank in ranks:
            assert rank['layouts', experts]
            assert rank['class', experts] == 'ToySegmentor'
            assert not any(module.startswith('torch.distributed')
                           for module in rank['hooks', experts])
            assert 'rmoe.parallel.state' in rank['hooks', experts]
            assert ('size mismatch for head.weight' in
                    rank['error', experts])


def test_uneven_parts_come_together(tmp_path):
    assert all(run_two_ranks(cut_and_join, str(tmp_path)))


def test_a_plain_model_is_left_alone():
    model = ToySegmentor(BACKBONE)
    hooks = [len(module._load_state_dict_pre_hooks)
             for module in model.modules()]
    accept_full_tensors(model)
    assert hooks == [len(module._load_state_dict_pre_hooks)
                     for module in model.modules()]


@pytest.mark.parametrize('sharded', [
    pytest.param(False, marks=pytest.mark.slow), True])
def test_averaged_weights_are_those_of_one_process(tmp_path, sharded):
    """Averaged, validated, saved and resumed on two ranks."""
    torch.manual_seed(1)
    start = tmp_path / 'start.pth'
    torch.save(dict(state_dict=ToySegmentor(PLAIN).state_dict()), start)
    job = dict(hooks=[EMA], validate=True, load_from=str(start))
    one = run_jobs(0, tmp_path, [dict(job, name='one')])
    layout = dict(layout=dict(expert_parallel=2),
                  checkpoint=dict(sharded=sharded, save_best='toy/mean',
                                  rule='greater'))
    iter_2 = tmp_path / 'two' / ('iter_2' if sharded else 'iter_2.pth')
    ranks = run_two_ranks(run_jobs, str(tmp_path), [
        dict(job, name='two', **layout),
        dict(job, name='again', **layout, resume=True) |
        dict(load_from=str(iter_2)),
        # What one process reads of the last.
        dict(job, name='file', layout={}, resume=True, max_iters=5) |
        dict(load_from=str(tmp_path / 'again' / iter_2.name.replace(
            '2', '4')))])
    expected = torch.load(tmp_path / 'one/iter_4.pth', weights_only=True)
    for rank in ranks:
        assert rank['again']['validated'] == rank['two']['validated'][1:]
        assert rank['two']['validated'] == pytest.approx(
            one['one']['validated'], abs=1e-5)
        for key, value in rank['two']['weights'].items():
            torch.testing.assert_close(
                value, expected['ema_state_dict'][f'module.{key}'],
                rtol=0, atol=1e-5)
            assert torch.equal(value, rank['again']['weights'][key])
    best = list((tmp_path / 'two').glob('best_*'))
    assert len(best) == 1 and best[0].is_dir() == sharded
    if not sharded:
        best = torch.load(best[0], weights_only=True)
        assert len(best['rng_state']) == 2
        found = torch.load(tmp_path / 'again/iter_4.pth', weights_only=True)
        assert found['ema_state_dict']['steps'] == 4
        for part in ('state_dict', 'ema_state_dict'):
            assert found[part].keys() == expected[part].keys()
            for key, value in expected[part].items():
                torch.testing.assert_close(found[part][key], value, rtol=0,
                                           atol=1e-5)
    last = torch.load(tmp_path / 'file/iter_5.pth', weights_only=True)
    assert last['ema_state_dict']['steps'] == 5
