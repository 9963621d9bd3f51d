"""Makes the tables of a report, with the numbers of all runs side by side, as
text."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Any

from rmoe.report.experts import Experts
from rmoe.report.scalars import MAIN_SCORES, Curve
from rmoe.report.work_dir import Run

NOTHING = '-'


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        head: the names of the columns.
        rows: the rows. The first cell of each is its name.
    """
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def main_scores(runs: Sequence[Run]) -> list[str]:
    """The names of the scores that charts show: those in ``MAIN_SCORES``, or
    the first score of all if the runs have none of them."""
    found = [name for run in runs for name in run.scalars.scores]
    return ([name for name in MAIN_SCORES if name in found] or found[:1])


def score_table(runs: Sequence[Run]) -> Table:
    """A table with every score at the last validation, and with the best value
    of the main scores."""
    names = list(dict.fromkeys(
        name for run in runs for name in run.scalars.scores))
    rows = [(name, *(_number(run.scalars.scores.get(name, {}), max)
                     for run in runs)) for name in names]
    if names:
        rows.append(('at iteration', *(
            str(max((step for curve in run.scalars.scores.values()
                     for step in curve), default=NOTHING)) for run in runs)))
    for name in main_scores(runs):
        curves = [run.scalars.scores.get(name, {}) for run in runs]
        rows.append((f'best {name}', *(
            _number(curve, _best_step) for curve in curves)))
        rows.append(('at iteration', *(
            str(_best_step(curve)) if curve else NOTHING
            for curve in curves)))
    rows.append(('last loss of the task', *(
        _number(run.scalars.task_loss(), max) for run in runs)))
    return Table(('', *(run.name for run in runs)), tuple(rows))


def cost_table(runs: Sequence[Run]) -> Table:
    """A table of the cost of training. If there is a dense run among several,
    the others also have the ratio to its cost."""
    lines: list[tuple[str, str, Callable[[float], str]]] = [
        ('seconds of training', 'seconds', seconds),
        ('seconds times ranks', 'device_seconds', seconds),
        ('seconds with validation and saving', 'wall_seconds', seconds),
        ('iterations', 'iterations', count), ('images', 'samples', count),
        ('operations', 'flops', operations),
        ('peak memory', 'peak_memory', size)]
    twin = dense_twin_of(runs)
    rows = [(label, *(
        _cost(run, key, show, twin) for run in runs))
        for label, key, show in lines]
    rows.append(('operations per image', *(
        operations(run.cost['flops'] / run.cost['samples'])
        if run.cost.get('samples') else NOTHING for run in runs)))
    rows.append(('trainable parameters, at the end', *(
        count(_stages(run)[-1]['trainable_parameters'])
        if _stages(run) else NOTHING for run in runs)))
    rows += [(label, *(str(run.cost.get(key, NOTHING)) for run in runs))
             for label, key in (('device', 'device'), ('ranks', 'world_size'))]
    return Table(('', *(run.name for run in runs)), tuple(rows))


def dense_twin_of(runs: Sequence[Run]) -> Run | None:
    """The dense run with which the others are compared: the first one, or None
    if there is none or only one run."""
    dense = [run for run in runs if run.cost and not run.num_moe_layers]
    return dense[0] if dense and len(runs) > 1 else None


def stage_table(run: Run) -> Table | None:
    """A table of the cost of each stage; None if there is only one."""
    stages = _stages(run)
    if len(stages) < 2:
        return None
    # The cost is kept for each set of parameters that trained. If each stage
    # trained another set, the names in the log are theirs.
    names = [stage.name for stage in run.log.stages]
    if len(names) != len(stages):
        names = [f'part {number}' for number in range(1, len(stages) + 1)]
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ('iterations', lambda stage: count(stage['iterations'])),
        ('images', lambda stage: count(stage['samples'])),
        ('operations', lambda stage: operations(stage['flops'])),
        ('operations per image', lambda stage: operations(
            stage['flops'] / max(stage['samples'], 1))),
        ('trainable parameters', lambda stage: count(
            stage['trainable_parameters'])),
        ('MoE layers that route', lambda stage: str(
            stage['moe_layers'] - stage['core_only_layers']))]
    return Table(('', *names), tuple(
        (label, *map(show, stages)) for label, show in lines))


def backbone_table(experts: Experts) -> Table | None:
    """A table of the costs of the backbone beside those of its dense twin;
    None if they were not counted."""
    if not experts.costs:
        return None
    model, twin = experts.costs.values()
    return Table(
        ('', *experts.costs, 'ratio'),
        tuple((label, show(getattr(model, key)), show(getattr(twin, key)),
               f'{getattr(model, key) / max(getattr(twin, key), 1):.3f}')
              for label, key, show in (
                  ('parameters', 'total_params', count),
                  ('of these, active for a token', 'active_params', count),
                  ('operations of a forward pass', 'flops', operations))))


def seconds(value: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}'


def count(value: float) -> str:
    return f'{value:,.0f}'


def operations(value: float) -> str:
    for prefix, scale in (('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6)):
        if value >= scale:
            return f'{value / scale:.4g} {prefix}FLOP'
    return f'{value:.0f} FLOP'


def size(value: float) -> str:
    return (f'{value / 1e9:.2f} GB' if value >= 1e9
            else f'{value / 1e6:.1f} MB')


def _cost(run: Run, key: str, show: Callable[[float], str],
          twin: Run | None) -> str:
    if key not in run.cost:
        return NOTHING
    text = show(run.cost[key])
    if twin is None or run is twin or not twin.cost.get(key):
        return text
    return f'{text} ({run.cost[key] / twin.cost[key]:.2f}x)'


def _stages(run: Run) -> list[dict[str, Any]]:
    return list(run.cost.get('stages', {}).values())


def _number(curve: Curve, choose: Callable[[Curve], int]) -> str:
    return f'{curve[choose(curve)]:.4g}' if curve else NOTHING


def _best_step(curve: Curve) -> int:
    """The iteration of the best score, the latest if there are several. A nan
    counts as the worst."""
    return max(curve, key=lambda step: (
        -inf if isnan(curve[step]) else curve[step], step))
