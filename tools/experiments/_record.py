"""The JSON record of a finished pipeline: small, and enough to redraw it."""
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _training import SCORES

from rmoe.upcycling import write_atomically


def write_record(folder: Path, experiment: str, pipeline: str, seed: int,
                 steps: dict[str, dict[str, Any]],
                 analyses: dict[str, dict[str, Any]]) -> Path:
    """Write ``folder/experiment/pipeline-seed.json``.

    Args:
        folder: of all records.
        experiment: name of the plan.
        pipeline: name in the plan.
        seed: of the steps that are not shared by all seeds.
        steps: what ``_steps.finish`` returned for each, with ``folder``,
            ``config`` (file name), ``options`` and ``seed``.
        analyses: what tools found, by their names.
    """
    record = dict(
        experiment=experiment, pipeline=pipeline, seed=seed,
        scores=scores(list(steps.values())[-1]['metrics']),
        steps={name: _step(step) for name, step in steps.items()},
        analyses={
            tool: {key: value for key, value in found.items()
                   if key not in ('config', 'checkpoint')}
            for tool, found in analyses.items()})
    path = folder / experiment / f'{pipeline}-seed{seed}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_text(record).encode())
    return path


def to_text(record: dict[str, Any]) -> str:
    """JSON with a line for each list of numbers, not for each number."""
    return re.sub(r'\[\s+([^][{}]*?)\s+\]',
                  lambda found: f'[{" ".join(found[1].split())}]',
                  json.dumps(record, indent=1)) + '\n'


def scores(metrics: dict[str, Any]) -> dict[str, float]:
    """The main ones, with two decimals as evaluators print them."""
    return {key: round(metrics[key], 4) for key in SCORES if key in metrics}


def _step(step: dict[str, Any]) -> dict[str, Any]:
    if 'folder' not in step:  # it was trained elsewhere
        return dict(checkpoint=Path(step['checkpoint']).name,
                    cost=step['cost'])
    return dict(
        config=step['config'], options=step['options'], seed=step['seed'],
        commit=step['commit'], versions=step['versions'],
        scores=scores(step['metrics']),
        curve=curve(step['folder']), routing=routing(step['folder']),
        cost={key: step['cost'][key] for key in (
            'seconds', 'samples', 'iterations', 'flops', 'peak_memory',
            'device')})


def curve(folder: Path) -> dict[str, list]:
    """Loss and scores of all runs in a work dir, by iteration; of what a
    stopped run did again, the second time. The loss is that of the task: a
    dense model has no ``loss_moe_*`` to compare with."""
    loss: dict[int, float] = {}
    score: dict[int, list] = {}
    last = 0
    for line in _lines(folder):
        if 'loss' in line:
            last = line['iter']
            loss[last] = round(line['loss'] - sum(
                value for key, value in line.items()
                if key.startswith('loss_moe_')), 4)
        elif scores(line):
            score[last] = next(iter(scores(line).items()))
    return dict(loss=[[step, value] for step, value in loss.items()],
                score=[[step, *value] for step, value in score.items()])


def routing(folder: Path) -> dict[str, dict[str, Any]]:
    """Of the last window of iterations, by layer: each expert's share of the
    tokens, their normalised entropy, the share of tokens nobody kept."""
    last: dict[str, float] = {}
    for line in _lines(folder):
        last.update({key: value for key, value in line.items()
                     if key.startswith('moe/')})
    layers: dict[str, dict[str, Any]] = {}
    for key, value in last.items():
        layer, _, what = key.removeprefix('moe/').rpartition('/')
        if what.startswith('load_'):
            layers.setdefault(layer, {}).setdefault('load', []).append(
                round(value, 4))
        elif what in ('entropy', 'unrouted'):
            layers.setdefault(layer, {})[what] = round(value, 4)
    return layers


def _lines(folder: Path) -> Iterable[dict[str, Any]]:
    for log in sorted(folder.glob('*/vis_data/scalars.json')):
        for text in log.read_text().splitlines():
            if text:
                yield json.loads(text)
