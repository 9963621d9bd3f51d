"""Writes and reads the records of finished pipelines. A record is small, but
tables and pictures can be made from it.

The records of a plan are a file of JSON lines, with a line for each pipeline
and seed.
"""
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _training import SCORES

from rmoe.upcycling import write_atomically


def write_record(folder: Path, experiment: str, pipeline: str, seed: int,
                 steps: dict[str, dict[str, Any]],
                 analyses: dict[str, dict[str, Any]]) -> Path:
    """Write a line into ``folder/experiment.jsonl``. It replaces an older line
    of the same pipeline and seed.

    Args:
        folder: the folder of all records.
        experiment: the name of the plan.
        pipeline: the name of the pipeline in the plan.
        seed: the seed of the steps that are not shared by all seeds.
        steps: the result of ``_steps.finish`` for each step, with ``folder``,
            ``config`` (the file name), ``options`` and ``seed``.
        analyses: the results of analysis tools, by the name of the tool.
    """
    record = dict(
        experiment=experiment, pipeline=pipeline, seed=seed,
        scores=scores(list(steps.values())[-1]['metrics']),
        steps={name: _step(step) for name, step in steps.items()},
        analyses={
            tool: {key: value for key, value in found.items()
                   if key not in ('config', 'checkpoint')}
            for tool, found in analyses.items()})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{experiment}.jsonl'
    with alone(folder):
        kept = {(each['pipeline'], each['seed']): each
                for each in read_records(path)}
        kept[pipeline, seed] = record
        write_atomically(path, ''.join(
            json.dumps(kept[key]) + '\n' for key in sorted(kept)).encode())
    return path


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a plan; empty if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Context with a lock on a folder. Trainings run in several threads and
    processes, and two of them may end at the same time and write the same
    file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def scores(metrics: dict[str, Any]) -> dict[str, float]:
    """The main scores, rounded to four decimals."""
    return {key: round(metrics[key], 4) for key in SCORES if key in metrics}


def _step(step: dict[str, Any]) -> dict[str, Any]:
    if 'folder' not in step:  # Its checkpoint was given with --dense.
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
    """The loss and scores of all runs in a work dir, by iteration.

    If a resumed run repeated iterations, the later values are taken. The loss
    is that of the task, without ``loss_moe_*``, so that it can be compared with
    that of a dense model.
    """
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
    """The statistics of routing in the last report of RoutingStatsHook, by
    layer: each expert's share of the tokens, the normalised entropy of these
    shares, and the share of tokens that no expert kept."""
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
