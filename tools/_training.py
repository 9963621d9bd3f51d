"""Starts tools/train.py and other tools from a tool, and reads their logs."""
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rmoe.report.scalars import MAIN_SCORES

TOOLS = Path(__file__).parent


def train(config: Path, folder: Path, *flags: str, gpus: int = 1,
          label: str = '  ') -> None:
    """Run tools/train.py in a process of its own. Its iterations are shown, and
    its whole output goes to ``folder/train.log``.

    Args:
        config: the file of a whole config.
        folder: the work dir.
        flags: further flags of tools/train.py.
        gpus: the number of processes on this machine. With more than one the
            training is distributed.
        label: the text before each line that is shown.

    Raises:
        ValueError: if the training fails, with its error or its last line of
            output.
    """
    start_tool('train.py', folder / 'train.log', str(config), '--work-dir',
               str(folder), *flags, *launcher(gpus), label=label,
               launch=launch(gpus))


def evaluate(config: Path, checkpoint: str, folder: Path, gpus: int = 1
             ) -> None:
    """Run tools/test.py in a process of its own, with ``folder`` as work dir.
    Its output goes to ``folder/test.log``.

    Raises:
        ValueError: if it fails, with its error or its last line of output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start_tool('test.py', folder / 'test.log', str(config), checkpoint,
               '--work-dir', str(folder), *launcher(gpus),
               launch=launch(gpus))


def launch(gpus: int) -> list[str]:
    """The arguments of Python that start ``gpus`` processes of a tool."""
    return [] if gpus == 1 else ['-m', 'torch.distributed.run',
                                 '--standalone', f'--nproc_per_node={gpus}']


def launcher(gpus: int) -> list[str]:
    """The flag that tells a tool how it was started."""
    return ['--launcher', 'none' if gpus == 1 else 'pytorch']


def start_tool(tool: str, log: Path, *args: str, label: str = '  ',
               launch: Sequence[str] = ()) -> None:
    """Run a tool in a process of its own, and show its training iterations.

    Args:
        tool: the file name in tools/.
        log: the file for its whole output.
        args: its command line.
        label: the text before each line that is shown.
        launch: arguments of Python before the tool.

    Raises:
        ValueError: if it fails, with its error or its last line of output.
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
        raise ValueError(f'{tool} failed ({reason or said}); its whole output '
                         f'is in {log}')


def scalars(folder: Path) -> list[dict]:
    """The lines that the last run in a work dir logged to scalars.json."""
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in logs[-1].read_text().splitlines()
            if line]


def last_validation(folder: Path) -> dict[str, float]:
    """The scores of the last validation in a work dir. Empty if the last run
    did not validate after the last iteration that it logged."""
    for line in reversed(scalars(folder)):
        if any(key in line for key in MAIN_SCORES):
            return line
        if 'loss' in line:
            break
    return {}


def test_scores(folder: Path) -> dict[str, float]:
    """The scores that tools/test.py wrote, with ``folder`` as its work dir."""
    results = [json.loads(path.read_text()) for path in sorted(
        folder.glob('*/*.json'))]
    return results[-1]
