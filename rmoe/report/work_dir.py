"""Reads all files of a work dir that tell something about its run."""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmoe.report.log import Log, read_logs
from rmoe.report.scalars import Scalars, read_scalars

SCALARS = '*/vis_data/scalars.json'


@dataclass(frozen=True)
class Run:
    """A run, as it is described by the files in its work dir.

    Attributes:
        name: a name that no other run of the report has.
        folder: its work dir.
        scalars: the numbers that it logged.
        log: the information in its text log.
        cost: the content of ``cost.json``; empty if there is none.
        config: the file with the whole config of its last start; None if
            there is none.
        checkpoint: the last checkpoint, a file or a folder; None if there is
            none.
    """
    name: str
    folder: Path
    scalars: Scalars
    log: Log
    cost: dict[str, Any]
    config: Path | None
    checkpoint: Path | None

    @property
    def num_moe_layers(self) -> int:
        """The number of MoE layers, from the cost or the statistics of
        routing; 0 for a dense model."""
        return max((stage.get('moe_layers', 0) for stage in
                    self.cost.get('stages', {}).values()),
                   default=len(self.scalars.layers))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read work dirs.

    Args:
        folders: the work dirs, all different.

    Raises:
        ValueError: if there is none, if one is given twice, or if one is no
            work dir.
    """
    if not folders:
        raise ValueError('there is no work dir to report on: name at least '
                         'one')
    folders = [folder.resolve() for folder in folders]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f'{folder} is named twice: name each work dir '
                             'once')
    return [_read_run(folder, name)
            for folder, name in zip(folders, _names(folders))]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder: name the work dir of a '
                         'training')
    files = sorted(folder.glob(SCALARS))
    cost = folder / 'cost.json'
    config = _config(folder)
    if not (files or cost.exists() or config):
        raise ValueError(
            f'{folder} is no work dir of a training: there is no {SCALARS} '
            '(written by the LocalVisBackend of the visualizer), no cost.json '
            'and no config in it')
    # A test also leaves a log, in a folder without numbers, which is not used
    # if there are folders with numbers.
    starts = [file.parents[1] for file in files] or sorted(
        path.parent for path in folder.glob('*/*.log'))
    log = read_logs(path for start in starts
                    for path in sorted(start.glob('*.log')))
    return Run(
        name, folder, read_scalars(files, log.epoch_length), log,
        _json(cost), config, _checkpoint(folder))


def _names(folders: Sequence[Path]) -> list[str]:
    """Names for the runs: as many of the last parts of their paths as are
    needed to tell them apart."""
    for length in range(1, max(len(path.parts) for path in folders) + 1):
        names = ['/'.join(path.parts[-length:]) for path in folders]
        if len(set(names)) == len(names):
            break
    return names


def _config(folder: Path) -> Path | None:
    """The config of the last start: the copy that the visualizer wrote, or
    else the one that the runner wrote; None if there is none."""
    copies = [file.parent / 'config.py'
              for file in sorted(folder.glob(SCALARS))]
    copies = [path for path in copies if path.exists()]
    dumped = sorted(folder.glob('*.py'), key=lambda path:
                    path.stat().st_mtime)
    return next(iter([*copies[::-1], *dumped[::-1]]), None)


def _checkpoint(folder: Path) -> Path | None:
    """The last checkpoint, also if the work dir was moved after the training;
    None if there is none."""
    noted = folder / 'last_checkpoint'
    if noted.exists():
        path = Path(noted.read_text().strip())
        for candidate in (folder / path.name, path):
            if candidate.exists():
                return candidate
    files = sorted(folder.glob('*.pth'), key=lambda path:
                   path.stat().st_mtime)
    return files[-1] if files else None


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
