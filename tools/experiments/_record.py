"""Writes and reads the records of finished pipelines. A record is small, but
tables and pictures can be made from it.

The records of a plan are a file of JSON lines, with a line for each pipeline
and seed.
"""
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rmoe.report.scalars import MAIN_SCORES, Scalars
from rmoe.report.work_dir import read_runs
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
    """The main scores, and after them those of single data sets, such as
    'camvid/mIoU'. They are rounded to four decimals."""
    single = [key for key in metrics if key.endswith('/mIoU')]
    return {key: round(metrics[key], 4)
            for key in (*MAIN_SCORES, *single) if key in metrics}


def _step(step: dict[str, Any]) -> dict[str, Any]:
    if 'folder' not in step:  # Its checkpoint was given with --dense.
        return dict(checkpoint=Path(step['checkpoint']).name,
                    cost=step['cost'])
    scalars, = (run.scalars for run in read_runs([step['folder']]))
    return dict(
        config=step['config'], options=step['options'], seed=step['seed'],
        commit=step['commit'], versions=step['versions'],
        scores=scores(step['metrics']),
        curve=curve(scalars), routing=routing(scalars),
        cost={key: step['cost'][key] for key in (
            'seconds', 'samples', 'iterations', 'flops', 'peak_memory',
            'device')})


def curve(scalars: Scalars) -> dict[str, list]:
    """The loss of the task and the first main score of a run, as pairs and
    triples that begin with the iteration."""
    name = next((name for name in MAIN_SCORES if name in scalars.scores), '')
    return dict(
        loss=[[step, round(value, 4)]
              for step, value in scalars.task_loss().items()],
        score=[[step, name, round(value, 4)]
               for step, value in scalars.scores.get(name, {}).items()])


def routing(scalars: Scalars) -> dict[str, dict[str, Any]]:
    """The statistics of routing in the last report of RoutingStatsHook, by
    layer: each expert's share of the tokens, the normalised entropy of these
    shares, and the share of tokens that no expert kept."""
    layers: dict[str, dict[str, Any]] = {}
    for layer, curves in scalars.layers.items():
        last = {what: round(values[max(values)], 4)
                for what, values in curves.items() if values}
        layers[layer] = {what: last[what] for what in ('entropy', 'unrouted')
                         if what in last}
        load = [value for what, value in last.items()
                if what.startswith('load_')]
        if load:
            layers[layer]['load'] = load
    return layers
