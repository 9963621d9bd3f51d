"""Start and end the process group of a distributed run.

mmengine can start it too, but only where there is a GPU.
"""
import logging
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_rank, is_distributed
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import (
    get_error_handler,
)

from rmoe.parallel.together import RaisedElsewhere

PORT = '29500'
# The environment variables that each launcher sets, by torch's names for the
# same values.
VARIABLES = {
    'pytorch': dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE',
                    LOCAL_RANK='LOCAL_RANK', MASTER_ADDR='MASTER_ADDR',
                    MASTER_PORT='MASTER_PORT'),
    'slurm': dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS',
                  LOCAL_RANK='SLURM_LOCALID'),
    'mpi': dict(RANK='OMPI_COMM_WORLD_RANK',
                WORLD_SIZE='OMPI_COMM_WORLD_SIZE',
                LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK',
                MASTER_ADDR='MASTER_ADDR'),
}
STARTED_BY = {
    'pytorch': 'tools/dist_train.sh CONFIG PROCESSES, or python -m '
               'torch.distributed.run',
    'slurm': 'tools/slurm_train.sh PARTITION NAME CONFIG, or srun',
    'mpi': 'mpirun -x MASTER_ADDR=HOST_OF_RANK_0',
}
# Devices for which mmengine starts the process group.
OTHER_DEVICES = ('npu', 'mlu', 'musa')
# Seconds within which a launcher notices that a process of its node has failed,
# and ends the others.
PATIENCE = 10
LOST = re.compile(
    '(closed|reset) by peer|broken pipe|remote process exited', re.IGNORECASE)


def start(launcher: str, dist_cfg: Mapping[str, Any] | None = None) -> str:
    """Start the process group of the processes that a launcher started.

    Where there are GPUs, each process takes the GPU of its local rank; nccl
    exchanges tensors on GPUs, gloo those on the CPU. Without GPUs, gloo
    exchanges all.

    Args:
        launcher: 'none', 'pytorch' (torchrun), 'slurm' or 'mpi' (Open MPI).
        dist_cfg: ``env_cfg.dist_cfg`` of a config: ``backend`` ('nccl'),
            ``timeout`` of a collective in seconds (torch's own if it is
            missing), and for slurm ``port`` of the first node (29500, or
            MASTER_PORT).

    Returns:
        A note for the log if something is not as the config says, else ''.

    Raises:
        ValueError: for an unknown option, a variable that the launcher did
            not set, or more processes on a machine than it has GPUs.
    """
    if launcher == 'none' or is_distributed() or (
            get_device() in OTHER_DEVICES):
        return ''
    options = _options(dist_cfg or {})
    _set_environment(launcher, options.get('port'))
    if has_gpu := torch.cuda.is_available():
        torch.cuda.set_device(_gpu(launcher))
    wanted = options.get('backend', 'nccl')
    backend, note = wanted, ''
    if wanted == 'nccl' and has_gpu:
        backend = 'cpu:gloo,cuda:nccl'
    elif 'nccl' in wanted and not has_gpu:
        backend = 'gloo'
        note = ('there is no GPU: the processes compute on CPUs and '
                f'exchange by gloo, not by {wanted}')
    limits: dict[str, Any] = {}
    if (seconds := options.get('timeout')) is not None:
        limits['timeout'] = timedelta(seconds=seconds)
    distributed.init_process_group(backend, **limits)
    return note


def stop() -> None:
    """End the process group, when all ranks have finished their work."""
    if is_distributed():
        distributed.destroy_process_group()


def give_up(error: BaseException, message: str = '') -> None:
    """Print an error, and end this process of a distributed run at once.

    ``destroy_process_group`` would wait for exchanges that this rank has
    begun and that the other ranks never join. When a process ends, its
    connections close, which the other ranks notice, and so does the launcher.

    An error that all ranks met is printed by one of them. A rank that stops
    because another rank failed gives the launcher time to name that rank.

    Args:
        error: the error for which the process ends.
        message: the text to print; the traceback if it is empty.
    """
    if isinstance(error.__cause__, RaisedElsewhere):
        time.sleep(PATIENCE)
    elif isinstance(error, RuntimeError) and LOST.search(str(error)):
        reason = re.sub(r'^\[\S+\] ', '', str(error)).split('. ')[0]
        _say(f'error: rank {get_rank()}: another rank has ended ({reason}); '
             'its own message or the summary of the launcher says why')
        time.sleep(PATIENCE)
    else:
        if message and get_rank():
            # Most often rank 0 met the same error; it prints the message.
            time.sleep(PATIENCE)
        # torchrun shows this error in its summary.
        get_error_handler().record_exception(error)
        _say(message or ''.join(traceback.format_exception(error)))
    logging.shutdown()
    sys.stdout.flush()
    os._exit(1)


def _say(text: str) -> None:
    # A single write, because the lines of several ranks would mix otherwise.
    sys.stderr.write(text.rstrip('\n') + '\n')
    sys.stderr.flush()


def _options(dist_cfg: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(dist_cfg)
    # The library by which mmengine would start the process group.
    if (other := options.pop('init_backend', 'torch')) != 'torch':
        raise ValueError(f'env_cfg.dist_cfg.init_backend={other!r} is not '
                         'supported: torch starts the process group. Leave '
                         "it out, or set it to 'torch'")
    if unknown := set(options) - {'backend', 'timeout', 'port'}:
        raise ValueError(f'env_cfg.dist_cfg has {sorted(unknown)}; it may '
                         'have backend, timeout and port')
    timeout = options.get('timeout')
    if timeout is not None and (
            isinstance(timeout, bool) or not isinstance(timeout, (int, float))
            or timeout <= 0):
        raise ValueError(f'env_cfg.dist_cfg.timeout={timeout!r} must be a '
                         'number of seconds above 0, such as 1800')
    return options


def _set_environment(launcher: str, port: int | None) -> None:
    """Copy the variables of a launcher to the names that torch and mmengine
    read."""
    if launcher not in VARIABLES:
        raise ValueError(f'launcher={launcher!r} must be none, '
                         + ', '.join(VARIABLES))
    names = VARIABLES[launcher]
    if missing := [name for name in names.values() if name not in os.environ]:
        raise ValueError(
            f'--launcher {launcher} reads {", ".join(names.values())} from '
            f'the environment, and {", ".join(missing)} is missing: start '
            f'with {STARTED_BY[launcher]}; or --launcher none for one process')
    found = {name: os.environ[source] for name, source in names.items()}
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        if not found[name].isdigit():
            raise ValueError(f'{names[name]}={found[name]!r} in the '
                             'environment must be a whole number')
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        found['MASTER_ADDR'] = _first_host()
    if port is not None:
        found['MASTER_PORT'] = str(port)
    os.environ.update(found)
    os.environ.setdefault('MASTER_PORT', PORT)


def _first_host() -> str:
    """Name of the first host of a Slurm job. The list of its nodes reads like
    'gpu[03-05],big1'."""
    nodes = os.environ.get('SLURM_NODELIST', '')
    if re.fullmatch(r'[\w.-]+', nodes):
        return nodes
    try:
        return subprocess.run(
            ['scontrol', 'show', 'hostnames', nodes], check=True,
            capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(
            f'scontrol does not name the first host of SLURM_NODELIST='
            f'{nodes!r} ({error}): set MASTER_ADDR to it') from error


def _gpu(launcher: str) -> int:
    """Index of the GPU that this process takes."""
    index, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if launcher == 'slurm' and count == 1:
        # Slurm can make its own GPU the only one that a task sees. Its index
        # is then 0, which mmengine reads from LOCAL_RANK.
        os.environ['LOCAL_RANK'] = '0'
        return 0
    if index >= count:
        raise ValueError(
            f'LOCAL_RANK={index}, and this machine has {count} GPUs: start at '
            f'most {count} processes here, or hide the GPUs from all of them '
            'with CUDA_VISIBLE_DEVICES=-1, so that they compute on CPUs')
    return index
