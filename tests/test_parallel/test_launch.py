"""What a launcher says, and what becomes of it."""
import re
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from rmoe.parallel import launch
from rmoe.parallel.together import RaisedElsewhere

TORCHRUN = dict(RANK='3', WORLD_SIZE='4', LOCAL_RANK='1',
                MASTER_ADDR='node1', MASTER_PORT='1234')
SLURM = dict(SLURM_PROCID='3', SLURM_NTASKS='4', SLURM_LOCALID='1',
             SLURM_NODELIST='node1')
MPI = dict(OMPI_COMM_WORLD_RANK='3', OMPI_COMM_WORLD_SIZE='4',
           OMPI_COMM_WORLD_LOCAL_RANK='1', MASTER_ADDR='node1')
GIVEN = dict(pytorch=TORCHRUN, slurm=SLURM, mpi=MPI)


@pytest.fixture
def machine(monkeypatch):
    """start() on a machine with so many GPUs; what it asked torch for."""
    environment: dict[str, str] = {}
    monkeypatch.setattr(launch.os, 'environ', environment)
    asked: dict = {}
    monkeypatch.setattr(
        distributed, 'init_process_group',
        lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr(torch.cuda, 'set_device',
                        lambda index: asked.update(device=index))

    def start(launcher, dist_cfg=None, gpus=0, **variables):
        environment.clear()
        environment.update(variables)
        asked.clear()
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
        note = launch.start(launcher, dist_cfg)
        return note, asked, environment

    return start


@pytest.mark.parametrize('launcher', GIVEN)
def test_who_this_process_is(machine, launcher):
    _, _, said = machine(launcher, **GIVEN[launcher])
    assert {name: said[name] for name in TORCHRUN} == dict(
        TORCHRUN, MASTER_PORT='1234' if launcher == 'pytorch' else '29500')


@pytest.mark.parametrize('launcher, name', [
    (launcher, name) for launcher, given in GIVEN.items() for name in given
    if name != 'SLURM_NODELIST'])
def test_a_missing_variable_is_named(machine, launcher, name):
    given = {key: value for key, value in GIVEN[launcher].items()
             if key != name}
    with pytest.raises(ValueError, match=(
            f'^--launcher {launcher} reads .*, and {name} is missing: start '
            'with .*; or --launcher none')):
        machine(launcher, **given)


@pytest.mark.parametrize('wanted, gpus, backend, note', [
    (None, 0, 'gloo', 'there is no GPU: .* exchange by gloo, not by nccl'),
    ('nccl', 0, 'gloo', 'there is no GPU'),
    ('gloo', 0, 'gloo', '^$'),
    ('cpu:gloo,cuda:nccl', 0, 'gloo', 'not by cpu:gloo,cuda:nccl$'),
    # Tensors of the CPU travel, too.
    (None, 2, 'cpu:gloo,cuda:nccl', '^$'),
    ('nccl', 2, 'cpu:gloo,cuda:nccl', '^$'),
    ('gloo', 2, 'gloo', '^$'),
])
def test_the_backend(machine, wanted, gpus, backend, note):
    said, asked, _ = machine('pytorch', wanted and dict(backend=wanted),
                             gpus, **TORCHRUN)
    assert re.search(note, said)
    assert asked == dict(backend=backend, **(dict(device=1) if gpus else {}))


def test_one_process_starts_nothing(machine):
    assert machine('none')[:2] == ('', {})


def test_options_of_the_config(machine):
    _, asked, said = machine('slurm', dict(
        backend='nccl', timeout=90, port=4321, init_backend='torch'), **SLURM)
    assert asked['timeout'] == timedelta(seconds=90)
    assert said['MASTER_PORT'] == '4321'


@pytest.mark.parametrize('dist_cfg, message', [
    (dict(timeout=0), 'timeout=0 must be a number of seconds above 0'),
    (dict(timeout='30m'), "timeout='30m' must be"),
    (dict(timout=3), r"dist_cfg has \['timout'\]; it may have backend, t"),
    (dict(init_backend='deepspeed'), "init_backend='deepspeed' is not sup"),
])
def test_unknown_options(machine, dist_cfg, message):
    with pytest.raises(ValueError, match=message):
        machine('pytorch', dist_cfg, **TORCHRUN)


@pytest.mark.parametrize('launcher, changed, message', [
    ('pytorch', dict(RANK='one'), "RANK='one' in the environment must be"),
    ('horovod', {}, "launcher='horovod' must be none, pytorch, slurm, mpi"),
    # scontrol is not here.
    ('slurm', dict(SLURM_NODELIST='gpu[03-05]'),
     r"first host of SLURM_NODELIST='gpu\[03-05\]'.* set MASTER_ADDR"),
])
def test_what_makes_no_sense(machine, launcher, changed, message):
    given = dict(GIVEN.get(launcher, {}), **changed)
    with pytest.raises(ValueError, match=message):
        machine(launcher, **given)


def test_an_address_beats_the_list_of_nodes(machine):
    _, _, said = machine('slurm', **dict(
        SLURM, SLURM_NODELIST='gpu[03-05]', MASTER_ADDR='gpu04',
        MASTER_PORT='77'))
    assert (said['MASTER_ADDR'], said['MASTER_PORT']) == ('gpu04', '77')


def test_more_processes_than_gpus(machine):
    with pytest.raises(ValueError, match='LOCAL_RANK=1, and this machine has '
                                         '1 GPUs: start at most 1 proc'):
        machine('pytorch', gpus=1, **TORCHRUN)
    # Slurm may show each task its own GPU alone.
    _, asked, said = machine('slurm', gpus=1, **SLURM)
    assert asked['device'] == 0
    assert said['LOCAL_RANK'] == '0'


class Ended(BaseException):
    """In place of os._exit."""


@pytest.fixture
def end(monkeypatch, capfd):
    """What a rank says and for how long it waits, before and after."""
    def give_up(error, message='', rank=0):
        waits, recorded = [], []

        def leave(status):
            assert status == 1
            raise Ended

        monkeypatch.setattr(launch.os, '_exit', leave)
        monkeypatch.setattr(launch, 'get_rank', lambda: rank)
        monkeypatch.setattr(launch.logging, 'shutdown', lambda: None)
        monkeypatch.setattr(launch.time, 'sleep', lambda seconds: waits.append(
            (seconds, capfd.readouterr().err)))
        monkeypatch.setattr(launch, 'get_error_handler', lambda: (
            SimpleNamespace(record_exception=recorded.append)))
        with pytest.raises(Ended):
            launch.give_up(error, message)
        assert recorded in ([], [error])
        return waits, capfd.readouterr().err, bool(recorded)

    return give_up


def test_an_error_is_told_by_the_rank_that_met_it(end):
    error = ValueError('wrong')
    assert end(error, 'error: wrong') == ([], 'error: wrong\n', True)
    # The first rank may have met the same and ends this one.
    assert end(error, 'error: rank 1: wrong', rank=1) == (
        [(launch.PATIENCE, '')], 'error: rank 1: wrong\n', True)
    waits, said, recorded = end(KeyError('wrong'), rank=1)
    assert (waits, recorded) == ([], True)
    assert said.endswith("KeyError: 'wrong'\n")
    error.__cause__ = RaisedElsewhere(1)
    assert end(error, 'error: wrong') == ([(launch.PATIENCE, '')], '', False)


@pytest.mark.parametrize('said, reason', [
    ('[/src/gloo/pair.cc:545] Read error [127.0.0.1]:54473: Connection reset '
     'by peer. This is typically caused by', 'Read error [127.0.0.1]:54473: '
     'Connection reset by peer'),
    ('[../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4',
     'Connection closed by peer [127.0.0.1]:4'),
    ('NCCL error in: x.cpp:1: remote process exited or there was a network '
     'error, NCCL version 2.27', 'NCCL error in: x.cpp:1: remote process '
     'exited or there was a network error, NCCL version 2.27'),
])
def test_a_rank_that_lost_another_lets_the_launcher_name_it(end, said, reason):
    (wait, ), after, recorded = end(RuntimeError(said), rank=2)
    assert wait == (launch.PATIENCE, (
        f'error: rank 2: another rank has ended ({reason}); its own message '
        'or the summary of the launcher says why\n'))
    assert (after, recorded) == ('', False)


def test_other_errors_of_an_exchange_are_told_whole(end):
    waits, said, recorded = end(RuntimeError('Timed out waiting 1800000ms'))
    assert (waits, recorded) == ([], True)
    assert said.endswith('RuntimeError: Timed out waiting 1800000ms\n')
