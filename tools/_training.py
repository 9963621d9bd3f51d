"""Start tools/train.py from another tool, and read what it logged."""
import json
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).with_name('train.py')


def train(config: Path, folder: Path, *flags: str, gpus: int = 1) -> None:
    """Train in a process of its own; show its iterations, keep all it says
    in ``folder/train.log``.

    Args:
        config: a whole config.
        folder: work dir.
        flags: further flags of tools/train.py.
        gpus: processes on this machine; more than one run distributed.

    Raises:
        ValueError: if training fails, with what it said last.
    """
    launch = [] if gpus == 1 else [
        '-m', 'torch.distributed.run', '--standalone',
        f'--nproc_per_node={gpus}']
    command = [sys.executable, *launch, str(TRAIN), str(config),
               '--work-dir', str(folder), *flags,
               '--launcher', 'none' if gpus == 1 else 'pytorch']
    log = folder / 'train.log'
    said = ''
    with open(log, 'a') as file, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True) as process:
        for line in process.stdout or ():
            file.write(line)
            said = line.strip() or said
            for mark in ('Iter(train)', 'Epoch(train)'):
                if mark in line:
                    print('  ' + ' '.join(line.split(mark)[1].split())[:76],
                          flush=True)
    if process.returncode:
        raise ValueError(f'training failed ({said}); all it said is in {log}')


def scalars(folder: Path) -> list[dict]:
    """What the last run in a work dir logged, line by line."""
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in logs[-1].read_text().splitlines()]


def metrics(folder: Path) -> dict[str, float]:
    """The last evaluation of the last run in a work dir."""
    return [line for line in scalars(folder)
            if 'loss' not in line and any(key in line for key in SCORES)][-1]


# Of a classifier, a segmentor, a detector.
SCORES = ('accuracy/top1', 'mIoU', 'coco/bbox_mAP', 'coco/segm_mAP')
