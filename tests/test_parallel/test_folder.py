"""Folders of parts: whole or an error, whatever comes between."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gather_checkpoint
import pytest
import torch
from commands import command
from sharded_cases import errors_of, write_below_a_file
from sharded_toy import PLAIN, run_jobs, sharded_runner
from toy import ToySegmentor
from two_ranks import run_two_ranks

from rmoe.engine import CheckpointHook
from rmoe.upcycling import read_checkpoint

pytestmark = pytest.mark.torch('2.8')
SHARDED = dict(sharded=True)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """By two ranks, as parts and as a file."""
    folder = tmp_path_factory.mktemp('written')
    torch.manual_seed(1)
    start = folder / 'start.pth'
    torch.save(dict(state_dict=ToySegmentor(PLAIN).state_dict()), start)
    job = dict(layout=dict(expert_parallel=2), max_iters=2,
               load_from=str(start))
    run_two_ranks(run_jobs, str(folder), [
        dict(job, name='parts', checkpoint=SHARDED), dict(job, name='file')])
    return folder


def test_one_file_is_made_of_a_folder(written, tmp_path, capsys):
    command(gather_checkpoint, written / 'parts/iter_2',
            tmp_path / 'out.pth')
    assert '100 % of' in capsys.readouterr().out
    found, expected = (torch.load(path, weights_only=True) for path in (
        tmp_path / 'out.pth', written / 'file/iter_2.pth'))
    for content in (found, expected):
        for name in ('time', 'experiment_name', 'cfg'):
            content['meta'].pop(name)
        # Seconds, and the path.
        content.pop('message_hub')
    equal(found, expected)
    command(gather_checkpoint, written / 'parts/iter_2',
            tmp_path / 'weights.pth', '--weights-only')
    weights = torch.load(tmp_path / 'weights.pth', weights_only=True)
    assert 'optimizer' not in weights
    equal(weights['state_dict'], expected['state_dict'])


def equal(found, expected, path=''):
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            equal(found[key], expected[key], f'{path}.{key}')
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected)):
            equal(one, other, f'{path}[{i}]')
    else:
        assert found == expected, path


def cut(path):
    with open(path, 'r+b') as file:
        file.truncate(path.stat().st_size - 10)


def scribble(path):
    path.write_bytes(b'\x80\x04cos\nsystem\n(S"true"\ntR.')


BROKEN = dict(
    missing=('__1_0.distcp', Path.unlink, 'which rank 1 wrote, is missing'),
    short=('__1_0.distcp', cut, 'which rank 1 wrote, is cut short'),
    first=('__0_0.distcp', cut, 'which rank 0 wrote, is cut short'),
    rest=('rest.pth', Path.unlink, 'which rank 0 wrote, is missing'),
    metadata=('.metadata', Path.unlink, 'whose saving did not end'),
    torn=('.metadata', cut, 'is corrupt, cut short'),
    code=('.metadata', scribble, 'asks for os.system'))


@pytest.fixture(scope='module')
def broken(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp('broken')
    for name, (file, damage, _) in BROKEN.items():
        shutil.copytree(written / 'parts/iter_2', folder / name)
        damage(folder / name / file)
    return folder


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_folder_names_file_and_rank(broken, tmp_path, case):
    runner = sharded_runner(tmp_path, resume=True,
                            load_from=str(broken / case))
    with pytest.raises(ValueError, match=BROKEN[case][2]):
        runner.train()


def test_a_folder_that_cannot_be_made(tmp_path):
    """Rank 0 meets it, and no other waits for that."""
    (tmp_path / 'file').write_text('')
    for said in run_two_ranks(write_below_a_file, str(tmp_path)):
        assert 'Not a directory' in said


def test_all_ranks_hear_of_it(broken, written, tmp_path):
    """Of what one of them meets, too; and of what does not fit."""
    for found in run_two_ranks(errors_of, str(tmp_path), str(broken),
                               str(written)):
        for name in ('missing', 'short'):
            assert BROKEN[name][2] in found[name]
        assert 'disk full' in found['one-rank']
        for name in ('other-head', 'other-experts'):
            assert 'tools/gather_checkpoint.py' in found[name]
        assert ('head.bias (in the checkpoint: (3,), in the model: (5,))'
                in found['other-head'])


def test_other_readers_name_the_command(written):
    with pytest.raises(ValueError, match=r'gather_checkpoint\.py .*iter_2'):
        read_checkpoint(written / 'parts/iter_2')


def test_settings_that_need_a_file(tmp_path):
    with pytest.raises(ValueError, match=r'published_keys=.*writes folders'):
        CheckpointHook(sharded=True, published_keys=['meta'])
    with pytest.raises(ValueError, match=r"out_dir='s3://bucket'"):
        sharded_runner(tmp_path, checkpoint=dict(
            sharded=True, out_dir='s3://bucket')).train()


KILLED = '''
import os, signal, sys
from sharded_toy import sharded_runner
from rmoe.parallel import folder
where = sys.argv[2]
if where == 'parts':
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    write = folder.write_content
    def write_content(path, content):
        kill() if 'iter_4' in str(path) else write(path, content)
    folder.write_content = write_content
else:
    rename = folder.Path.rename
    def second(path, target):
        if path.name == '.iter_4.tmp' and list(path.parent.glob('.*.old')):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)
    folder.Path.rename = second
sharded_runner(sys.argv[1], checkpoint=dict(
    sharded=True, save_best='toy/mean', rule='greater'), validate=True,
    max_iters=4, resume=where == 'renaming').train()
'''


@pytest.mark.parametrize('where', ['parts', 'renaming'])
def test_a_kill_while_saving_loses_nothing(tmp_path, where):
    if where == 'renaming':
        # Saved a second time, with the score of its validation.
        sharded_runner(tmp_path, max_iters=2, checkpoint=SHARDED,
                       validate=True).train()
    tests = Path(__file__).parents[1]
    code = subprocess.run(
        [sys.executable, '-c', KILLED, str(tmp_path), where],
        capture_output=True, text=True, env=dict(
            os.environ, PYTHONPATH=f'{tests}:{tests.parent}'))
    assert code.returncode == -signal.SIGKILL, code.stderr
    left = {path.name for path in tmp_path.glob('.iter_4*')}
    last = (tmp_path / 'last_checkpoint').read_text()
    if where == 'parts':
        assert left == {'.iter_4.tmp'} and last.endswith('iter_2')
    else:
        assert left == {'.iter_4.tmp', '.iter_4.old'}
        assert last.endswith('iter_4') and not Path(last).exists()
    resumed = sharded_runner(tmp_path, max_iters=5, resume=True,
                             checkpoint=SHARDED, validate=True)
    resumed.train()
    assert resumed.iter == 5
    assert not [path for path in tmp_path.iterdir()
                if path.name.startswith('.iter')]
    assert (tmp_path / 'iter_4').is_dir()


def test_old_folders_go_and_the_best_stays(tmp_path):
    sharded_runner(tmp_path, max_iters=6, interval=1, validate=True,
                   checkpoint=dict(sharded=True, max_keep_ckpts=2,
                                   save_best='toy/mean', rule='greater')
                   ).train()
    folders = sorted(path.name for path in tmp_path.iterdir()
                     if (path / '.metadata').exists())
    best = [name for name in folders if name.startswith('best_')]
    assert [name for name in folders if name not in best] == [
        'iter_5', 'iter_6']
    assert len(best) == 1
    assert (tmp_path / 'last_checkpoint').read_text() == str(
        tmp_path / 'iter_6')
    again = sharded_runner(tmp_path, max_iters=7, resume=True, interval=1,
                           checkpoint=dict(sharded=True, max_keep_ckpts=2))
    again.train()
    assert {path.name for path in tmp_path.glob('iter_*')} == {
        'iter_6', 'iter_7'}
    weights = sharded_runner(tmp_path / 'evaluated', validate=True,
                             load_from=str(tmp_path / best[0]))
    weights.val()
