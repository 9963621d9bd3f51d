"""Runs a step of a pipeline: trains a config to its end, starting from a
checkpoint, unless this was done before."""
import json
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _training import TOOLS, evaluate, last_validation, test_scores, train
from mmengine.config import Config

from rmoe.upcycling import read_checkpoint, state_dict_of, write_atomically

# The files of the repository, beside the config, on which a result depends.
RUN = ('train.py', '../rmoe')
# The names of distributions on which a result depends. mmcv has two, and all of
# OpenMMLab have another one in the fork.
LIBRARIES = ('rmoe', 'torch', 'mmengine', 'mmcv', 'mmcv-lite',
             'mmsegmentation', 'mmdet', 'onedl-mmengine', 'onedl-mmcv',
             'onedl-mmsegmentation', 'onedl-mmdetection')


def given(checkpoint: Path) -> dict:
    """The record of a dense checkpoint that was trained elsewhere."""
    if not checkpoint.exists():
        raise FileNotFoundError(f'--dense {checkpoint} does not exist')
    cost = checkpoint.with_name('cost.json')
    if not cost.exists():
        print(f'  the cost of {checkpoint} is not known, because there is no '
              f'{cost}: it is not counted')
    return dict(checkpoint=str(checkpoint.resolve()), metrics={},
                cost=json.loads(cost.read_text()) if cost.exists() else None)


def finish(cfg: Config, start: str | None, folder: Path, gpus: int,
           label: str = '  ') -> dict:
    """Train one step to its end, unless that was done before.

    Args:
        cfg: the config of the step. It is changed to start from ``start``.
        start: the checkpoint of the step before, or None.
        folder: the work dir. The record of the step is ``step.json`` in it.
        gpus: the number of processes.
        label: the text before each line about the progress.

    Returns:
        The content of ``step.json``: config, commit, versions, checkpoint,
        metrics and cost.

    Raises:
        ValueError: if the folder holds a run of another config, or training
            fails.
    """
    cfg.load_from = None
    if start:
        # The file may be that of a whole model or of a backbone alone. The
        # latter can only be loaded by the backbone.
        whole = any(key.startswith('backbone.')
                    for key in state_dict_of(read_checkpoint(start)))
        cfg.load_from = start if whole else None
        cfg.model.backbone.init_cfg = None if whole else dict(
            type='Pretrained', checkpoint=start)
    record, config = folder / 'step.json', folder / 'step.py'
    result: dict[str, Any] = dict(
        config=cfg.pretty_text, commit=commit(), versions=versions())
    if record.exists():
        kept = json.loads(record.read_text())
        if kept['config'] != result['config']:
            raise ValueError(f'{folder} holds a run with other settings: '
                             'remove it, or choose another --work-dir')
        if 'checkpoint' in kept:
            print(f'{label}done before', flush=True)
            return kept
    print(f'{label}{folder.name}', flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps(result).encode())
    config.write_text(result['config'])
    last = folder / 'last_checkpoint'
    train(config, folder, *(['--resume'] if last.exists() else []), gpus=gpus,
          label=label)
    checkpoint = str(Path(last.read_text()).resolve())
    score = last_validation(folder)
    # If the training was stopped between its last checkpoint and the validation
    # of it, the scores are missing or older. The step in the log and the number
    # in the name of the checkpoint both count epochs, or both iterations.
    if str(score.get('step')) != Path(checkpoint).stem.rpartition('_')[2]:
        evaluate(config, checkpoint, folder / 'test', gpus=gpus)
        score = test_scores(folder / 'test')
    result.update(
        checkpoint=checkpoint,
        metrics=score,
        cost=json.loads((folder / 'cost.json').read_text()))
    write_atomically(record, json.dumps(result, indent=1).encode())
    return result


def commit() -> str:
    """The commit of the code that runs, with a '+' if files were changed since.
    Empty if there is no git repository."""
    def git(*args: str) -> str:
        return subprocess.run(['git', '-C', str(TOOLS), *args], text=True,
                              capture_output=True).stdout.strip()
    try:
        head = git('rev-parse', 'HEAD')
        return head and head + ('+' if git(
            'status', '--porcelain', '-uno', '--', *RUN) else '')
    except OSError:  # The command git is not installed.
        return ''


def versions() -> dict[str, str]:
    """The versions of the installed libraries on which a result depends."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def total(costs: list[dict]) -> dict:
    """The costs of a pipeline: sums over its steps, and the largest peak of
    memory."""
    return dict(
        {key: sum(cost[key] for cost in costs)
         for key in ('seconds', 'samples', 'flops')},
        peak_memory=max(cost['peak_memory'] for cost in costs))
