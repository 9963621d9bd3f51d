"""By how much processes grow, beside what plan_parallel.py says of them:

    torchrun --nproc-per-node 2 tests/resident_memory.py CONFIG --layout 1

Three training steps on the CPU in a layout, with random images. No test: a
process's size depends on its allocator, too.
"""
import argparse
import ctypes
import gc
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / 'tools' / part)
                             for part in ('', 'analysis_tools'))]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from _plan.layouts import layouts  # noqa: E402
from _plan.samples import loss_inputs  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from rmoe.engine.memory import PeakMemory, resident_bytes  # noqa: E402
from rmoe.parallel import FullySharded  # noqa: E402
from rmoe.registry import MODELS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('--image-size', type=int, default=256)
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--layout', type=int, required=True,
                        help='which of them: what one leaves behind would '
                        'blur the next')
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    size = dist.get_world_size()
    layout = layouts(size, size, size)[args.layout]
    warm_up()
    shrink()
    start = resident_bytes()
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    inputs = loss_inputs(model, args.batch_size, (args.image_size, ) * 2)
    wrapped = DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=True) if (
        layout.ddp) else FullySharded(
            model, shard=1 if layout.shard == 1 else None,
            expert_parallel=layout.experts)
    optimizer = torch.optim.AdamW(wrapped.parameters())
    # In the second one DDP puts gradients into other buckets.
    for _ in range(2):
        step(model, wrapped, optimizer, inputs)
    gc.collect()
    shrink()
    between = resident_bytes() - start
    with PeakMemory() as watch:
        step(model, wrapped, optimizer, inputs)
        peak = watch.peak()
    print(f'{layout.name}, rank {dist.get_rank()}: {between / 1e9:.2f} GB '
          f'between steps, {peak / 1e9:.2f} GB more inside one', flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # as tests/two_ranks.py does


def step(model: torch.nn.Module, wrapped: torch.nn.Module,
         optimizer: torch.optim.Optimizer, inputs: dict) -> None:
    """As mmengine's: gradients go after it."""
    loss, _ = model.parse_losses(wrapped(**inputs, mode='loss'))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def warm_up() -> None:
    """Load what a step loads of libraries."""
    small = DistributedDataParallel(torch.nn.Conv2d(3, 8, 3))
    optimizer = torch.optim.AdamW(small.parameters())
    small(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    MODELS.build(dict(type='UPerHead', in_channels=[8] * 4, channels=8,
                      num_classes=2, in_index=[0, 1, 2, 3]))


def shrink() -> None:
    """Give back what is free."""
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == '__main__':
    main()
