"""Train a segmentor (mmseg config) or a detector (mmdet config)."""
import argparse

import torch
from _config import add_common_arguments, load_config, run, start_processes
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

from rmoe import compat, safe_loading
from rmoe.checks.data import check_data
from rmoe.engine.memory import keep_freed_memory
from rmoe.engine.precision import set_precision


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--resume', nargs='?', const='auto',
                        metavar='CHECKPOINT',
                        help='continue from CHECKPOINT, or from the latest '
                        'one in the work dir')
    parser.add_argument('--amp', action='store_true',
                        help='automatic mixed precision: in bfloat16 on the '
                        'CPU and on a GPU that has it, otherwise in float16 '
                        'by AmpOptimWrapper; with optim_wrapper.dtype=float16 '
                        'a GPU always computes in float16')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the batch size')
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    notes = [start_processes(cfg)]
    if cfg.get('compile'):
        compat.require('compile=True')
    notes.append(set_precision(cfg, args.amp))
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError('--auto-scale-lr needs '
                             'auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    # With --resume but without a checkpoint in the work dir, this is the first
    # run, which starts from load_from.
    if args.resume and (args.resume != 'auto'
                        or find_latest_checkpoint(cfg.work_dir)):
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    check_data(cfg, ('train', 'val'))
    safe_loading.install()
    if not torch.cuda.is_available():
        keep_freed_memory()
    runner = (RUNNERS.build(cfg) if 'runner_type' in cfg
              else Runner.from_cfg(cfg))
    for note in filter(None, notes):
        runner.logger.info(note)
    runner.train()


if __name__ == '__main__':
    run(main)
