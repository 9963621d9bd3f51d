"""Functions that several tools share: they add the common flags, read the
config, start processes and report errors."""
import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction

from rmoe.parallel import launch
from rmoe.parallel.data_parallel import choose_wrapper


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--work-dir',
                        help='folder for logs, checkpoints and results; the '
                        "default is the config's, or else "
                        './work_dirs/<config name>')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of the config: key=value '
                        'pairs such as model.backbone.moe.num_experts=4 or '
                        'key="[(a,b),(c,d)]"')
    parser.add_argument('--launcher', default='none',
                        choices=['none', 'pytorch', 'slurm', 'mpi'])
    # torch.distributed.launch passes one of the two spellings, depending on the
    # version of torch.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config, and apply the overrides of the command line to it."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def start_processes(cfg: Config) -> str:
    """Start the process group for ``cfg.launcher``, and choose the model
    wrapper for it.

    Returns:
        A line for the log; see :func:`rmoe.parallel.launch.start`.
    """
    note = launch.start(cfg.launcher, (cfg.get('env_cfg') or {}).get(
        'dist_cfg'))
    if cfg.launcher != 'none':
        choose_wrapper(cfg)
    return note


def run(main: Callable[[], None]) -> None:
    """Run a tool. An error that the user can fix is shown as one message
    without a traceback."""
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        message = explain(error)
        if launch.is_distributed():
            launch.give_up(error, message)
        if not message:
            raise
        sys.exit(message)
    launch.stop()


def explain(error: BaseException) -> str:
    """The message for the user; '' if the error should have a traceback."""
    if os.environ.get('RMOE_TRACEBACK') or not isinstance(
            error, (FileNotFoundError, ValueError)):
        return ''
    rank = f'rank {number}: ' if (number := launch.get_rank()) else ''
    return f'error: {rank}{error}\n(RMOE_TRACEBACK=1 shows the traceback)'
