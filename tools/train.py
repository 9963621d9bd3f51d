"""Train a segmentor (mmseg config) or a detector (mmdet config)."""
import argparse

import torch
from _config import add_common_arguments, load_config, run, start_processes
from _memory import keep_freed_memory
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

from rmoe import compat, safe_loading
from rmoe.checks.data import check_data
from rmoe.engine.amp import gpu_has_bfloat16
from rmoe.registry import type_name

AMP = 'AmpOptimWrapper'
BFLOAT16 = 'rmoe.BFloat16OptimWrapper'
# Where AmpOptimWrapper works.
ACCELERATORS = ('cuda', 'npu', 'mlu', 'musa')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--resume', nargs='?', const='auto',
                        metavar='CHECKPOINT',
                        help='go on from CHECKPOINT, or from the latest one '
                        'in the work dir')
    parser.add_argument('--amp', action='store_true',
                        help='automatic mixed precision: bfloat16 on the '
                        'CPU and on a GPU that has it, else float16 by '
                        'AmpOptimWrapper; optim_wrapper.dtype=float16 asks '
                        'for float16')
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
    # A first run has nothing to resume, and starts from its load_from.
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


def set_precision(cfg: Config, amp: bool) -> str:
    """Mixed precision where --amp or the config asks for it.

    Returns:
        Which type computes and why, to be logged; '' in full precision.

    Raises:
        ValueError: if --amp meets another kind of optimizer wrapper.
    """
    wrapper = cfg.optim_wrapper
    kind = type_name(wrapper) or 'OptimWrapper'
    if kind == 'BFloat16OptimWrapper' or not (amp or kind == AMP):
        return ''
    if kind not in (AMP, 'OptimWrapper'):
        raise ValueError('--amp works with optim_wrapper.type='
                         f"'OptimWrapper', the config has {kind!r}")
    device = get_device()
    if device not in ACCELERATORS:
        _compute_in_bfloat16(wrapper)
        return ('mixed precision without a GPU is in bfloat16, with no loss '
                f'scale: {BFLOAT16} takes the place of {AMP}')
    # 'torch.float16' where the config is written in Python.
    dtype = str(wrapper.get('dtype') or '').removeprefix('torch.')
    has_bfloat16 = device == 'cuda' and gpu_has_bfloat16()
    if amp and ((not dtype and has_bfloat16) or
                (dtype == 'bfloat16' and kind != AMP)):
        _compute_in_bfloat16(wrapper)
        return ('mixed precision is in bfloat16, with no loss scale: '
                f'{BFLOAT16} takes the place of {kind}')
    why = 'as the config says'
    if kind != AMP:
        wrapper.type = AMP
        wrapper.setdefault('loss_scale', 'dynamic')
        if not dtype:
            why = f'for there is no bfloat16 on this {device} device'
    elif not dtype and has_bfloat16:
        why += '; with --amp it is in bfloat16, in which experts are faster'
    return f'mixed precision is in {dtype or "float16"} by {AMP}, {why}'


def _compute_in_bfloat16(wrapper: ConfigDict) -> None:
    wrapper.type = BFLOAT16
    # It has nothing to scale and one type.
    for option in ('loss_scale', 'dtype', 'use_fsdp'):
        wrapper.pop(option, None)


if __name__ == '__main__':
    run(main)
