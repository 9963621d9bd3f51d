"""Run a tool on two ranks, each its own process, as a launcher would.

Ranks are copies of a process that has imported what takes long; what a
launcher does when one fails, the parent does here: it ends the others.
"""
import os
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

import mmengine.config.config
import torch
from commands import command
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.multiprocessing import ProcessExitedException, start_processes
from two_ranks import PRELOADED

from rmoe.parallel import launch


def run_on_ranks(tool, folder: Path, *args, ranks: int = 2,
                 breaks: type[Exception] | None = None
                 ) -> tuple[int, list[str]]:
    """The exit status of a tool, and what each rank printed.

    Args:
        tool: a module of tools/.
        folder: gets what each rank prints.
        args: its command line, without --launcher.
        breaks: an error that rank 1 raises before its second iteration.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    forkserver.set_forkserver_preload(PRELOADED)
    status = 0
    try:
        start_processes(_run, (tool.__name__, folder, ranks, port, args,
                               breaks),
                        nprocs=ranks, start_method='forkserver')
    except ProcessExitedException as error:
        status = error.exit_code
    return status, [(folder / f'rank{rank}.txt').read_text()
                    for rank in range(ranks)]


def _run(rank, tool, folder, ranks, port, args, breaks):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    os.environ.pop('RMOE_TRACEBACK', None)
    torch.set_num_threads(1)
    said = os.open(folder / f'rank{rank}.txt',
                   os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    # As conftest.py does.
    mmengine.config.config.FormatCode = lambda text, **_: (text, False)
    # Those who wait for the launcher wait for the parent, which is quick.
    launch.PATIENCE = 2
    if breaks and rank == 1:
        _break_training(breaks)
    command(__import__(tool), *args, '--launcher', 'pytorch')
    assert not torch.distributed.is_initialized()
    sys.stdout.flush()
    os._exit(0)


class _Breaks(Hook):

    def __init__(self, kind):
        self.kind = kind

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1:
            raise self.kind('broken on purpose')


def _break_training(kind):
    register = Runner.register_hooks

    def register_with_breaks(runner, *args):
        register(runner, *args)
        runner.register_hook(_Breaks(kind))

    Runner.register_hooks = register_with_breaks
