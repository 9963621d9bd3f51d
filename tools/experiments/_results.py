"""Reads records, and computes means over seeds, gains and costs of whole
pipelines from them."""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _record import read_records
from scipy.stats import t as student


@dataclass(frozen=True)
class Runs:
    """One pipeline of an experiment, with all its seeds.

    Attributes:
        name: the name of the pipeline.
        records: its records by seed, in order of the seeds.
    """
    name: str
    records: dict[int, dict[str, Any]]

    def scores(self) -> dict[int, float]:
        """The main score by seed, in percent. The scores of COCO's evaluator
        are fractions and are multiplied by 100; all others are in percent
        already."""
        found = {}
        for seed, record in self.records.items():
            name, score = next(iter(record['scores'].items()))
            found[seed] = 100 * score if name.startswith('coco/') else score
        return found

    def mean(self, seeds: Iterable[int] | None = None) -> float:
        """The mean score of these seeds, or of all."""
        scores = self.scores()
        return mean(scores[seed] for seed in (
            scores if seeds is None else seeds))

    def gains(self, base: 'Runs') -> dict[int, float]:
        """The differences to the scores of another pipeline, for the seeds that
        both have.

        Raises:
            ValueError: if they have no seed in common.
        """
        mine, theirs = self.scores(), base.scores()
        both = {seed: mine[seed] - theirs[seed]
                for seed in mine if seed in theirs}
        if not both:
            raise ValueError(f'{self.name} and {base.name} share no seed')
        return both

    def rescored(self, model: str = 'as it is', flips: bool = False
                 ) -> 'Runs':
        """The same runs with the scores of rescore.py instead of their own.
        Seeds for which rescore.py did not score this model are left out."""
        found = {}
        for seed, record in self.records.items():
            for row in record['analyses'].get('rescore', dict(rows=[]))[
                    'rows']:
                if row['model'] == model:
                    found[seed] = dict(record, scores=dict(
                        mIoU=row['flips' if flips else 'score']))
        return Runs(self.name, found)

    def only(self, score: str) -> 'Runs':
        """The same runs with one of their scores alone, such as
        'camvid/mIoU'."""
        return Runs(self.name, {
            seed: dict(record, scores={score: record['scores'][score]})
            for seed, record in self.records.items()})

    def gain(self, base: 'Runs') -> float:
        """The mean of the gains."""
        return mean(self.gains(base).values())

    def interval(self, base: 'Runs') -> float:
        """Half the width of the 95 % interval of the mean gain, by Student's t.

        Raises:
            ValueError: if there is only one pair of scores.
        """
        gains = list(self.gains(base).values())
        if len(gains) < 2:
            raise ValueError(f'{self.name} and {base.name} share the seeds '
                             f'{list(self.gains(base))}: an interval needs '
                             'at least two')
        return float(student.ppf(.975, len(gains) - 1) * stdev(gains)
                     / len(gains) ** .5)

    def cost(self, what: str, last_only: bool = False) -> float:
        """The mean over seeds of a cost, summed over the steps, or of the last
        step only."""
        return mean(
            sum(step['cost'][what] for step in list(
                record['steps'].values())[-1 if last_only else 0:])
            for record in self.records.values())

    def loss(self) -> dict[int, float]:
        """The mean training loss in the last quarter of the last step, by
        seed."""
        found = {}
        for seed in self.records:
            losses = self.last_step(seed)['curve']['loss']
            last = losses[-1][0]
            found[seed] = mean(loss for step, loss in losses
                               if step > 0.75 * last)
        return found

    def loss_over(self, base: 'Runs') -> float:
        """The mean training loss over that of another pipeline. Only seeds that
        both have count, because with the same seed the batches are the
        same."""
        mine, theirs = self.loss(), base.loss()
        both = mine.keys() & theirs.keys()
        return (sum(mine[seed] for seed in both) /
                sum(theirs[seed] for seed in both))

    def last_step(self, seed: int) -> dict[str, Any]:
        return list(self.records[seed]['steps'].values())[-1]

    def routing(self) -> dict[str, float]:
        """The means over seeds of the numbers of :func:`summarise` for the last
        step."""
        each = [summarise(self.last_step(seed)['routing'].values())
                for seed in self.records]
        return {key: mean(one[key] for one in each) for key in each[0]}


def read(path: Path, order: Sequence[str]) -> dict[str, Runs]:
    """Read the pipelines that have records in a file, in the given order."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in read_records(path):
        found.setdefault(record['pipeline'], {})[record['seed']] = record
    return {name: Runs(name, dict(sorted(found[name].items())))
            for name in order if name in found}


def swept_seeds(runs: Runs) -> list[int]:
    return [seed for seed, record in runs.records.items()
            if 'capacity_sweep' in record.get('analyses', {})]


def sweeps(runs: Runs) -> list[list[dict[str, Any]]]:
    """The rows of capacity_sweep.py for each seed that has them."""
    return [runs.records[seed]['analyses']['capacity_sweep']['rows']
            for seed in swept_seeds(runs)]


def mean_rows(each: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a sweep, with scores and costs averaged over seeds."""
    averaged = []
    for rows in zip(*each, strict=True):
        averaged.append({
            key: mean(row[key] for row in rows)
            if isinstance(value, float) else value
            for key, value in rows[0].items()})
    return averaged


def swept(runs: Runs, order: str, capacity: float | None) -> Runs:
    """The same runs with the scores of one row of capacity_sweep.py."""
    found = {}
    for seed, rows in zip(swept_seeds(runs), sweeps(runs)):
        score = next(row['score'] for row in rows if (
            row['order'], row['capacity']) == (order, capacity))
        found[seed] = dict(runs.records[seed], scores=dict(mIoU=score))
    return Runs(runs.name, found)


def timed(runs: Runs) -> list[dict[str, Any]]:
    """The rows of capacity_sweep.py for the reference and for Batch Prioritized
    Routing, with operations and time over those of the dense cores.

    Scores and operations are means over seeds. The time is that of the first
    seed, because other seeds shared the machine when they were measured.
    """
    rows = mean_rows(sweeps(runs))
    return [dict(row, operations=row['gflops'] / rows[0]['dense_gflops'],
                 time=first['milliseconds'] / first['dense_milliseconds'])
            for row, first in zip(rows, sweeps(runs)[0])
            if row['order'] != 'first come']


def specialised(runs: Runs) -> list[dict[str, Any]]:
    """The results of specialisation.py for each seed that has them."""
    return [record['analyses']['specialisation']
            for record in runs.records.values()
            if 'specialisation' in record.get('analyses', {})]


def summarise(layers: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Summarise the routing of all MoE layers: the mean normalised entropy of
    the loads, the mean share of tokens that no expert kept, and the smallest
    load of any expert over its fair share. Empty without MoE layers."""
    layers = [layer for layer in layers if 'load' in layer]
    return {} if not layers else dict(
        entropy=mean(layer['entropy'] for layer in layers),
        unrouted=mean(layer['unrouted'] for layer in layers),
        smallest_load=min(min(layer['load']) * len(layer['load'])
                          for layer in layers))
