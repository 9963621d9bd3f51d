"""Start tools/train.py from another tool, and read what it logged."""
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).parent
# Of a classifier, a segmentor, a detector.
SCORES = ('accuracy/top1', 'mIoU', 'coco/bbox_mAP', 'coco/segm_mAP')


def train(config: Path, folder: Path, *flags: str, gpus: int = 1,
          label: str = '  ') -> None:
    """Run tools/train.py in a process of its own; show its iterations, keep
    all it says in ``folder/train.log``.

    Args:
        config: a whole config.
        folder: work dir.
        flags: further flags of tools/train.py.
        gpus: processes on this machine; more than one run distributed.
        label: what is shown before each line.

    Raises:
        ValueError: if training fails, with what it said last.
    """
    start_tool('train.py', folder / 'train.log', str(config), '--work-dir',
               str(folder), *flags, *launcher(gpus), label=label,
               launch=launch(gpus))


def evaluate(config: Path, checkpoint: str, folder: Path, gpus: int = 1
             ) -> None:
    """Run tools/test.py in a process of its own, with ``folder`` as work
    dir; all it says is in ``folder/test.log``.

    Raises:
        ValueError: if it fails, with what it said last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start_tool('test.py', folder / 'test.log', str(config), checkpoint,
               '--work-dir', str(folder), *launcher(gpus),
               launch=launch(gpus))


def launch(gpus: int) -> list[str]:
    """Python's arguments that start so many processes of a tool."""
    return [] if gpus == 1 else ['-m', 'torch.distributed.run',
                                 '--standalone', f'--nproc_per_node={gpus}']


def launcher(gpus: int) -> list[str]:
    """The flag that tells a tool how it was started."""
    return ['--launcher', 'none' if gpus == 1 else 'pytorch']


def start_tool(tool: str, log: Path, *args: str, label: str = '  ',
               launch: Sequence[str] = ()) -> None:
    """Run a tool in a process of its own; show its training iterations.

    Args:
        tool: file name in tools/.
        log: file that gets all it says.
        args: its command line.
        label: what is shown before each line.
        launch: Python's arguments before the tool.

    Raises:
        ValueError: if it fails, with what it said last.
    """
    command = [sys.executable, *launch, str(TOOLS / tool), *args]
    said = reason = ''
    with open(log, 'a') as file, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True) as process:
        for line in process.stdout or ():
            file.write(line)
            said = line.strip(' =\n') or said
            if line.startswith('error: '):
                reason = reason or line.strip()
            for mark in ('Iter(train)', 'Epoch(train)'):
                if mark in line:
                    print(label + ' '.join(line.split(mark)[1].split())[:76],
                          flush=True)
    if process.returncode:
        raise ValueError(f'{tool} failed ({reason or said}); all it said is '
                         f'in {log}')


def scalars(folder: Path) -> list[dict]:
    """What the last run in a work dir logged, line by line."""
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in logs[-1].read_text().splitlines()
            if line]


def last_validation(folder: Path) -> dict[str, float]:
    """Of the last run in a work dir; empty if there was none after its last
    training iteration that was logged."""
    for line in reversed(scalars(folder)):
        if any(key in line for key in SCORES):
            return line
        if 'loss' in line:
            break
    return {}


def test_scores(folder: Path) -> dict[str, float]:
    """What tools/test.py found, with ``folder`` as its work dir."""
    results = [json.loads(path.read_text()) for path in sorted(
        folder.glob('*/*.json'))]
    return results[-1]
