"""What two ranks count; see two_ranks.py."""
from pathlib import Path

from toy import STAGES, toy_runner


def train_and_count(rank: int, work_dir: str) -> bool:
    """Six iterations through all stages; whether this rank wrote a file."""
    folder = Path(work_dir) / str(rank)
    toy_runner(
        folder, max_iters=6, hooks=(
            dict(type='rmoe.ResidualMoEHook', stages=STAGES),
            dict(type='rmoe.CostHook')),
        launcher='pytorch', env_cfg=dict(dist_cfg=dict(backend='gloo')),
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel', device_ids=None,
            broadcast_buffers=False)).train()
    return (folder / 'cost.json').exists()
