"""Which files of a work dir a report reads."""
import pytest
from run_folder import DENSE, cost, dense_and_moe, write_run

from rmoe.report.work_dir import read_runs


def test_names_are_the_shortest_that_differ(tmp_path):
    folders = [write_run(tmp_path / seed / name)
               for seed in ('seed0', 'seed1') for name in ('moe', 'dense')]
    assert [run.name for run in read_runs(folders)] == [
        'seed0/moe', 'seed0/dense', 'seed1/moe', 'seed1/dense']
    assert [run.name for run in read_runs(folders[:2])] == ['moe', 'dense']


def test_a_run_with_and_without_experts(tmp_path):
    moe, dense = read_runs(dense_and_moe(tmp_path))
    assert (moe.num_moe_layers, dense.num_moe_layers) == (1, 0)
    # without a cost.json, the statistics tell
    assert read_runs([write_run(tmp_path / 'x')])[0].num_moe_layers == 1


def test_the_last_config_and_checkpoint(tmp_path):
    write_run(tmp_path, config='a = 1\n')
    run, = read_runs([tmp_path])
    assert run.checkpoint is None
    (tmp_path / 'iter_9.pth').touch()
    (tmp_path / 'iter_10.pth').touch()
    # The folder has moved since.
    (tmp_path / 'last_checkpoint').write_text('/nowhere/iter_9.pth')
    write_run(tmp_path, DENSE, config='a = 2\n', start='20300102_000000')
    run, = read_runs([tmp_path])
    assert run.config.read_text() == 'a = 2\n'
    assert run.checkpoint == tmp_path / 'iter_9.pth'
    (tmp_path / 'iter_9.pth').unlink()
    assert read_runs([tmp_path])[0].checkpoint.name == 'iter_10.pth'


def test_no_config_but_that_of_the_runner(tmp_path):
    write_run(tmp_path, costs=cost())
    for file in tmp_path.glob('*/vis_data/*'):
        file.unlink()
    (tmp_path / 'swin.py').write_text('a = 3\n')
    run, = read_runs([tmp_path])
    assert run.config == tmp_path / 'swin.py'
    assert run.log.stages, 'the log is there all the same'


@pytest.mark.parametrize('names, message', [
    ([], 'name at least one'), (['moe', './moe'], 'named twice'),
    (['nothing'], 'nothing is no folder: name the work dir'),
    (['empty'], r'empty is no work dir of a training: there is no \*/vis_da'),
])
def test_what_is_no_work_dir(tmp_path, names, message):
    write_run(tmp_path / 'moe')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match=message):
        read_runs([tmp_path / name for name in names])
