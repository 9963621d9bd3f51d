"""Run the tools as their command lines would, on a few drawn scenes."""
import re
import sys
from pathlib import Path

from _config import run
from fresh_process import forget

CONFIGS = Path(__file__).parents[1] / 'configs/demo'
DENSE = CONFIGS / 'swin-micro_upernet_scenes-128x128.py'
MOE = CONFIGS / 'swin-micro-moe-e8k1_upernet_scenes-128x128.py'


def command(module, *args):
    """Run a tool in this process, as its command line would."""
    forget()
    argv, sys.argv = sys.argv, [module.__name__, *map(str, args)]
    try:
        run(module.main)
    finally:
        sys.argv = argv


def options(work, name, *more):
    data = [f'{split}_dataloader.dataset.data_root={work / "scenes"}'
            for split in ('train', 'val', 'test')]
    return ['--work-dir', work / name, '--cfg-options', *data,
            'train_cfg.max_iters=4', 'train_dataloader.batch_size=2',
            'default_hooks.checkpoint.interval=2',
            'default_hooks.logger.interval=1',
            'default_hooks.report.enabled=False', *more]


def miou(folder: Path) -> float:
    """The last mIoU that was written below a folder."""
    files = sorted(folder.rglob('*.json'), key=lambda f: f.stat().st_mtime)
    values = re.findall(r'"mIoU": ([\d.]+)', ''.join(
        file.read_text() for file in files))
    return float(values[-1])
