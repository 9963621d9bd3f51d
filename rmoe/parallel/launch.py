"""Start and end the group of processes.

mmengine would start it too, but asks for a GPU first.
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
# What a launcher must have put into the environment; and what it is by torch's
# names.
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
# mmengine knows how to start these.
OTHER_DEVICES = ('npu', 'mlu', 'musa')
# Seconds in which a launcher notices that a process of its node failed and
# ends the others.
PATIENCE = 10
LOST = re.compile(
    '(closed|reset) by peer|broken pipe|remote process exited', re.IGNORECASE)


def start(launcher: str, dist_cfg: Mapping[str, Any] | None = None) -> str:
    """Start the group of processes that a launcher announced.

    On GPUs each process takes the one of its local rank, tensors there
    travel by nccl and tensors of the CPU by gloo. Without GPUs all travel by
    gloo.

    Args:
        launcher: 'none', 'pytorch' (torchrun), 'slurm' or 'mpi' (Open MPI).
        dist_cfg: ``env_cfg.dist_cfg`` of a config: ``backend`` ('nccl'),
            ``timeout`` of a collective in seconds (torch's own if it is
            missing), and for slurm ``port`` of the first node (29500, or
            MASTER_PORT).

    Returns:
        What is not as the config says, to be logged; '' if all is.

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
    """End the group after all ranks came to their end."""
    if is_distributed():
        distributed.destroy_process_group()


def give_up(error: BaseException, message: str = '') -> None:
    """Tell an error, and end this process of a group at once.

    ``destroy_process_group`` would wait for exchanges that this rank has
    begun and the others never join. A process that ends closes its
    connections, which the others notice, and so does their launcher.

    One rank tells what all met. A rank that stops because of another gives
    the launcher time to name that one.

    Args:
        error: why it ends.
        message: what to say of it; a traceback if empty.
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
            # Most often rank 0 met the same and says it.
            time.sleep(PATIENCE)
        # For torchrun's summary.
        get_error_handler().record_exception(error)
        _say(message or ''.join(traceback.format_exception(error)))
    logging.shutdown()
    sys.stdout.flush()
    os._exit(1)


def _say(text: str) -> None:
    # At once, or the lines of several ranks mix.
    sys.stderr.write(text.rstrip('\n') + '\n')
    sys.stderr.flush()


def _options(dist_cfg: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(dist_cfg)
    # What mmengine would start it with.
    if (other := options.pop('init_backend', 'torch')) != 'torch':
        raise ValueError(f'env_cfg.dist_cfg.init_backend={other!r}: processes '
                         "are started by torch, leave it out or say 'torch'")
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
    """Put what a launcher says under the names that torch and mmengine
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
    """Of a Slurm job, whose list of nodes reads like 'gpu[03-05],big1'."""
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
    """The GPU of this process."""
    index, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if launcher == 'slurm' and count == 1:
        # Slurm can show each task its own GPU alone. mmengine reads this.
        os.environ['LOCAL_RANK'] = '0'
        return 0
    if index >= count:
        raise ValueError(
            f'LOCAL_RANK={index}, and this machine has {count} GPUs: start at '
            f'most {count} processes here, or hide the GPUs from all of them '
            'with CUDA_VISIBLE_DEVICES=-1')
    return index
