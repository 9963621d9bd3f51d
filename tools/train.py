"""Train a segmentor (mmseg config) or a detector (mmdet config)."""
import argparse

import torch
from _config import add_common_arguments, load_config, run
from _memory import keep_freed_memory
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from rmoe import compat
from rmoe.engine.data_check import check_data_roots


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--resume', nargs='?', const='auto',
                        metavar='CHECKPOINT',
                        help='go on from CHECKPOINT, or from the latest one '
                        'in the work dir')
    parser.add_argument('--amp', action='store_true',
                        help='automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the batch size')
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError('--auto-scale-lr needs '
                             'auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    check_data_roots(cfg, ('train', 'val'))
    compat.apply()
    if not torch.cuda.is_available():
        keep_freed_memory()
    runner = (RUNNERS.build(cfg) if 'runner_type' in cfg
              else Runner.from_cfg(cfg))
    runner.train()


def use_amp(cfg: Config) -> None:
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper == 'AmpOptimWrapper':
        return
    if wrapper != 'OptimWrapper':
        raise ValueError('--amp works with optim_wrapper.type='
                         f"'OptimWrapper', the config has {wrapper!r}")
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


if __name__ == '__main__':
    run(main)
