"""train.py and test.py on several processes without a GPU."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test as test_tool  # tools/test.py
import torch
import train
from coco import make_coco
from commands import command, miou, options
from mmengine.config import Config
from tool_ranks import run_on_ranks
from toy_detection import detection_config

TOOLS = Path(train.__file__).parent


def values(name, text) -> list[float]:
    return [float(found) for found in re.findall(rf'\b{name}: ([\d.e+-]+)',
                                                 text)]


def errors(text) -> list[str]:
    return re.findall(r'^error: [^(\n]*\b', text, re.MULTILINE)


def trained(folder, text):
    assert 'exchange by gloo, not by nccl' in text
    return torch.load(folder / 'iter_4.pth', weights_only=False)['state_dict']


def test_a_segmentor(tmp_path, work, configs):
    flags = options(work, 'ranks', 'auto_scale_lr.base_batch_size=2')
    status, (first, second) = run_on_ranks(
        train, tmp_path, configs['moe'], '--auto-scale-lr', *flags)
    assert status == 0, first + second
    trained(work / 'ranks', first)
    assert 'labels of 8 of 8 training images' in first
    # Twice the batch, twice the rate.
    assert values('lr', first)[0] == 2 * values('base_lr', first)[0]
    assert 'mIoU' not in second
    # There are three images, of which the second rank has one.
    flags = options(work, 'ranks-test')
    status, (first, _) = run_on_ranks(
        test_tool, tmp_path, configs['moe'], work / 'ranks/iter_4.pth',
        *flags)
    assert status == 0
    command(test_tool, configs['moe'], work / 'ranks/iter_4.pth',
            *options(work, 'alone-test'))
    assert miou(work / 'ranks-test') == miou(work / 'alone-test')


@pytest.mark.parametrize('wrapper', [
    dict(type='MMDistributedDataParallel'),
    pytest.param(dict(type='rmoe.FullySharded', expert_parallel=2,
                      param_dtype='bfloat16'),
                 marks=pytest.mark.torch('2.8'))])
def test_more_ranks_than_images(tmp_path, wrapper):
    """Train and test a detector for an epoch, with a wrapper that the config
    names."""
    make_coco(tmp_path, images=1)
    cfg = detection_config(tmp_path)
    cfg.model_wrapper_cfg = wrapper
    cfg.dump(tmp_path / 'detector.py')
    args = [tmp_path / 'detector.py', '--work-dir', tmp_path / 'work']
    status, (first, second) = run_on_ranks(train, tmp_path / 'said', *args)
    assert status == 0, first + second
    checkpoint = next((tmp_path / 'work').glob('epoch_1.pth'))
    status, (first, second) = run_on_ranks(
        test_tool, tmp_path / 'said', args[0], checkpoint, *args[1:])
    assert status == 0, first + second
    if 'param_dtype' in wrapper:  # one process has no wrapper, and no bfloat16
        return
    command(test_tool, args[0], checkpoint, '--work-dir', tmp_path / 'alone')
    score = values('coco/bbox_mAP', (max((tmp_path / 'alone').rglob('*.log'))
                                     ).read_text())
    assert values('coco/bbox_mAP', first) == score != []


@pytest.mark.parametrize('kind, said', [
    (KeyError, "KeyError: 'broken on purpose'"),
    (ValueError, 'error: rank 1: broken on purpose'),
])
def test_an_error_of_one_rank_ends_the_others(tmp_path, work, configs, kind,
                                              said):
    begin = time.monotonic()
    status, (first, second) = run_on_ranks(
        train, tmp_path, configs['dense'], *options(work, kind.__name__),
        breaks=kind)
    assert status == 1
    assert time.monotonic() - begin < 60
    assert said in second
    # The first rank may also have been ended before it could print its error.
    assert 'Traceback' not in first
    assert errors(first) in ([], ['error: rank 0: another rank has ended'])


def test_what_all_ranks_meet_is_said_once(tmp_path, work, configs):
    for changed, said in (
            ('train_dataloader.dataset.data_root=nowhere',
             'error: nowhere does not exist'),
            # This is raised in the constructor of a hook, on each rank by
            # itself.
            ('default_hooks.label_check.max_files=0',
             'max_files=0 must be at least 1')):
        status, (first, second) = run_on_ranks(
            train, tmp_path, configs['dense'], *options(work, 'all'), changed)
        assert status == 1
        assert said in first
        assert not errors(second)


def torchrun(nproc, *args, **variables) -> subprocess.Popen:
    """Start dist_train.sh with this Python."""
    return subprocess.Popen(
        ['bash', TOOLS / 'dist_train.sh', args[0], str(nproc), *map(
            str, args[1:])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=dict(os.environ, PYTHON=sys.executable,
                            OMP_NUM_THREADS='1', **variables))


def worker_of(launcher: int, rank: int) -> int:
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            parent = (folder / 'stat').read_text().split(') ')[1].split()[1]
            if int(parent) == launcher and f'RANK={rank}' in (
                    folder / 'environ').read_text().split('\0'):
                return int(folder.name)
        except OSError:
            pass
    raise AssertionError(f'rank {rank} is not there')


@pytest.fixture(scope='module')
def sharded(work, configs):
    """A config with which two ranks learn the same as one process with twice
    the batch: it draws no random numbers, and no part of it depends on a whole
    batch."""
    cfg = Config.fromfile(configs['moe'])
    cfg.model_wrapper_cfg = dict(type='rmoe.FullySharded', expert_parallel=2)
    cfg.model.backbone.drop_path_rate = 0.
    cfg.model.backbone.moe.router = dict(
        type='TokenChoiceRouter', noise_std=0., loss_weights={})
    cfg.model.decode_head.norm_cfg = dict(type='GN', num_groups=8)
    cfg.train_dataloader.dataset.pipeline[2].prob = 0.
    # Gradients that are zero except for rounding change no weight.
    cfg.optim_wrapper.optimizer.eps = 1e-3
    cfg.train_cfg.val_interval = 8
    cfg.dump(work / 'sharded.py')
    return work / 'sharded.py'


@pytest.mark.torch('2.8')
@pytest.mark.skipif(not Path('/proc/self/environ').exists(),
                    reason='finds ranks in /proc')
def test_a_killed_rank_is_named_and_one_process_goes_on(tmp_path, work,
                                                        sharded):
    """dist_train.sh is killed in the middle of a training. After --resume, the
    score is that of a training that was not killed."""
    flags = options(work, 'killed', 'train_cfg.max_iters=8')
    process = torchrun(2, sharded, *flags)
    said = ''
    try:
        for line in process.stdout:
            said += line
            if 'Iter(train) [3/' in line:
                os.kill(worker_of(process.pid, 1), signal.SIGKILL)
                killed = time.monotonic()
                break
        said += process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert time.monotonic() - killed < 60, said
    assert process.returncode == 1
    cause = said[said.index('Root Cause'):]
    assert re.search(r'rank +: 1\b', cause) and '(SIGKILL)' in cause
    last = Path((work / 'killed/last_checkpoint').read_text()).stem
    assert last in ('iter_2', 'iter_4')
    command(train, sharded, '--resume', *flags,
            'train_dataloader.batch_size=4')
    status, (first, second) = run_on_ranks(
        train, tmp_path, sharded,
        *options(work, 'whole', 'train_cfg.max_iters=8'))
    assert status == 0, first + second
    assert miou(work / 'killed') == miou(work / 'whole')
    found, whole = (torch.load(work / name / 'iter_8.pth')['state_dict']
                    for name in ('killed', 'whole'))
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-4)
    # The parts of two ranks serve an evaluation by windows, too.
    assert score(work, sharded, 'one') == score(
        work, sharded, 'two', ranks=2)


def score(work, config, name, ranks=1):
    """mIoU with sliding windows, whose number differs between images."""
    flags = (config, work / 'whole/iter_8.pth',
             *options(work, name, 'model.test_cfg.mode=slide',
                      'model.test_cfg.crop_size=(48,48)',
                      'model.test_cfg.stride=(32,32)'))
    if ranks == 1:
        command(test_tool, *flags)
    else:
        status, said = run_on_ranks(test_tool, work / 'said', *flags)
        assert status == 0, said
    return miou(work / name)


@pytest.mark.slow
def test_two_nodes(work, configs):
    """Two launchers on this machine, with one process each."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    flags = options(work, 'nodes')
    nodes = [torchrun(1, configs['dense'], *flags, NNODES='2',
                      NODE_RANK=str(node), MASTER_ADDR='127.0.0.1',
                      PORT=str(port)) for node in (0, 1)]
    # Both are read at the same time, because a process stops when its output
    # pipe is full.
    with ThreadPoolExecutor() as readers:
        said = list(readers.map(
            lambda node: node.communicate(timeout=200)[0], nodes))
    assert [node.returncode for node in nodes] == [0, 0], '\n'.join(said)
    assert 'Saving checkpoint at 4 iterations' in said[0]
