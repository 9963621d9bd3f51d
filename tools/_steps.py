"""A step of a pipeline: a config, trained to its end from a checkpoint."""
import json
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _training import TOOLS, evaluate, last_validation, test_scores, train
from mmengine.config import Config

from rmoe.upcycling import read_checkpoint, state_dict_of, write_atomically

# What decides a result, beside the config.
RUN = ('train.py', '../rmoe')
# Distributions; mmcv has two, and all but torch one more of the fork.
LIBRARIES = ('rmoe', 'torch', 'mmengine', 'mmcv', 'mmcv-lite',
             'mmsegmentation', 'mmdet', 'onedl-mmengine', 'onedl-mmcv',
             'onedl-mmsegmentation', 'onedl-mmdetection')


def given(checkpoint: Path) -> dict:
    """The record of a dense checkpoint that was trained elsewhere."""
    if not checkpoint.exists():
        raise FileNotFoundError(f'--dense {checkpoint} does not exist')
    cost = checkpoint.with_name('cost.json')
    if not cost.exists():
        print(f'  what {checkpoint} cost is not known (no {cost}): it is not '
              'counted')
    return dict(checkpoint=str(checkpoint.resolve()), metrics={},
                cost=json.loads(cost.read_text()) if cost.exists() else None)


def finish(cfg: Config, start: str | None, folder: Path, gpus: int,
           label: str = '  ') -> dict:
    """Train one step to its end, unless that was done before.

    Args:
        cfg: of the step; it gets where to start from.
        start: checkpoint of the step before, or None.
        folder: work dir; ``step.json`` says what was run there.
        gpus: processes.
        label: what lines about its progress begin with.

    Returns:
        What ``step.json`` has: config, commit, versions, checkpoint, metrics
        and cost.

    Raises:
        ValueError: if the folder holds a run of another config, or training
            fails.
    """
    cfg.load_from = None
    if start:
        # A bare backbone has no whole model to load.
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
    # Stopped between its last checkpoint and its validation? Loggers and
    # checkpoints count alike, epochs or iterations.
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
    """Of the code that runs; '+' if it was changed since."""
    def git(*args: str) -> str:
        return subprocess.run(['git', '-C', str(TOOLS), *args], text=True,
                              capture_output=True).stdout.strip()
    try:
        head = git('rev-parse', 'HEAD')
        return head and head + ('+' if git(
            'status', '--porcelain', '-uno', '--', *RUN) else '')
    except OSError:  # no git here
        return ''


def versions() -> dict[str, str]:
    """Of what is installed of the libraries that a result depends on."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def total(costs: list[dict]) -> dict:
    """Sums over steps; of memory the largest."""
    return dict(
        {key: sum(cost[key] for cost in costs)
         for key in ('seconds', 'samples', 'flops')},
        peak_memory=max(cost['peak_memory'] for cost in costs))
