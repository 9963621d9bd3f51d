"""Makes the tables of experiments, as Markdown."""
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from statistics import stdev

from _results import (
    Runs,
    mean_rows,
    specialised,
    sweeps,
    swept,
    swept_seeds,
    timed,
)

DENSE = 'non-moe'


def pipelines(runs: Mapping[str, Runs]) -> str:
    """The table of the four pipelines of RMoE (2204.09636), with scores and the
    costs of all steps."""
    base = runs[DENSE]
    rows = []
    for name, each in runs.items():
        rows.append([
            name, upstream(each), *score(each),
            '' if name == DENSE else gain(each, base),
            f'{each.loss_over(base):.3f}',
            f'{each.cost("flops") / 1e12:.0f}',
            *(f'{each.cost("flops") / runs[other].cost("flops"):.3f}'
              if other in runs else '' for other in (DENSE, 'moe')),
            f'{each.cost("seconds") / 60:.0f}'])
    return markdown(
        ('pipeline', 'upstream top-1', 'seeds', 'mean', 'over non-moe',
         'training loss / non-moe', 'operations, 10^12', 'over non-moe',
         'over moe', 'minutes'), rows)


def variants(runs: Mapping[str, Runs]) -> str:
    """The table of variants that each change one thing, over the first of
    them."""
    base = next(iter(runs.values()))
    rows = []
    for each in runs.values():
        loads = each.routing()
        rows.append([
            each.name, *score(each), '' if each is base else gain(each, base),
            f'{each.loss_over(base):.3f}',
            f'{each.cost("flops", True) / base.cost("flops", True):.3f}',
            f'{loads["smallest_load"]:.2f}' if loads else ''])
    return markdown(
        ('variant', 'seeds', 'mean', f'over {base.name}',
         f'training loss / {base.name}', 'operations',
         'smallest load / fair share'), rows)


def paired(runs: Mapping[str, Runs]) -> str:
    """The table of variants over the first of them, which is dense, and over
    the one with one expert, with 95 % intervals. The column for the mean of
    the experts is about the dense model that has the mean of the experts'
    weights. There are no mean scores, because variants with fewer seeds cannot
    be compared by them."""
    base = next(iter(runs.values()))
    one = next((each for name, each in runs.items()
                if 'e1' in name.split('-')), None)
    rows = []
    for name, each in runs.items():
        mean = each.rescored('mean')
        rows.append([
            name, score(each)[0], '' if each is base else gain(each, base),
            gain(each, one) if one and 'dense' not in name and (
                each is not one) else '',
            gain(mean, base) if mean.records else '',
            f'{each.loss_over(base):.3f}', f'{flops(each) / flops(base):.3f}'])
    head = ('variant', 'seeds', 'over dense', 'over one expert',
            'mean of its experts over dense', 'training loss / dense',
            'operations')
    # Not every plan has the mean of the experts scored.
    filled = [any(column) for column in zip(*rows)]
    return markdown(tuple(compress(head, filled)),
                    [list(compress(row, filled)) for row in rows])


def data_sets(runs: Mapping[str, Runs]) -> str:
    """The table of variants that serve two data sets, with the scores of each
    and the gains over the first variant, which is dense."""
    base = next(iter(runs.values()))
    names = list(next(iter(base.records.values()))['scores'])[1:]
    rows = []
    for each in runs.values():
        row = [each.name]
        for name in names:
            one = each.only(name)
            row += [score(one)[0],
                    '' if each is base else gain(one, base.only(name))]
        rows.append([*row, f'{each.loss_over(base):.3f}',
                     f'{flops(each) / flops(base):.3f}'])
    head = [text for name in names for text in (
        f'{name.removesuffix("/mIoU")}, seeds', 'over dense')]
    return markdown(('variant', *head, 'training loss / dense', 'operations'),
                    rows)


def noise(runs: Mapping[str, Runs]) -> str:
    """The table of the difference between four experts and dense, and of its
    deviation from seed to seed, for several ways to train and to score."""
    rows = []
    for what, *names in (
            ('with stochastic depth', 'dense-drop', 'e4-drop'),
            ('without', 'dense', 'e4'),
            ('without, a tail of small rate', 'dense-tail', 'e4-tail'),
            ('without, 1,500 iterations', 'dense-long', 'e4-straight-long')):
        if not runs.keys() >= set(names):
            continue
        for flips in (False, True):
            dense, moe = (runs[name].rescored(flips=flips) for name in names)
            gains = list(moe.gains(dense).values())
            if len(gains) < 2:
                continue
            each = [f'{stdev(one.scores().values()):.2f}'
                    for one in (dense, moe)]
            rows.append([
                what, 'yes' if flips else 'no', str(len(gains)), *each,
                f'{stdev(gains):.2f}', gain(moe, dense)])
    return markdown(
        ('trained', 'scored over flips', 'seeds', 'deviation of dense',
         'of four experts', 'of their difference', 'difference'), rows)


def routers(runs: Mapping[str, Runs]) -> str:
    """The table of routers with about equal compute."""
    base = next(iter(runs.values()))
    rows = []
    for each in runs.values():
        loads = each.routing()
        rows.append([
            each.name, *score(each),
            '' if each is base else gain(each, base),
            f'{each.cost("flops", True) / base.cost("flops", True):.3f}',
            *([f'{loads["entropy"]:.3f}', f'{loads["smallest_load"]:.2f}',
               f'{100 * loads["unrouted"]:.0f} %'] if loads else 3 * [''])])
    return markdown(
        ('router', 'seeds', 'mean', f'over {base.name}', 'operations',
         'load entropy', 'smallest load / fair share',
         'tokens without expert'), rows)


def flops(runs: Runs) -> float:
    """The operations of the last step."""
    return runs.cost('flops', True)


def score(runs: Runs) -> list[str]:
    """The texts of the scores of all seeds in order, and of their mean."""
    return [', '.join(f'{score:.1f}' for score in runs.scores().values()),
            f'{runs.mean():.2f}']


def gain(runs: Runs, base: Runs) -> str:
    """The text of the mean gain, paired by seed. From three seeds on it has a
    95 % interval; that of two seeds would be wider than any score."""
    text = f'{runs.gain(base):+.2f}'
    if len(runs.gains(base)) < 3:
        return text
    return f'{text} ± {runs.interval(base):.2f}'


def upstream(runs: Runs) -> str:
    """The text of the accuracy of the last classifier of a pipeline, its mean
    over seeds. Empty if a run has no classifier."""
    found = [[step['scores']['accuracy/top1']
              for step in record['steps'].values()
              if 'accuracy/top1' in step.get('scores', {})]
             for record in runs.records.values()]
    if not all(found):
        return ''
    return f'{sum(each[-1] for each in found) / len(found):.1f}'


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (
        head, ['---'] * len(head), *rows))


def capacities(runs: Mapping[str, Runs]) -> str:
    """The table of score and operations at each capacity. A row above each
    model has those of the dense model."""
    rows = []
    for name, each in runs.items():
        measured = sweeps(each)
        if not measured:
            continue
        found = mean_rows(measured)
        dense = found[0]['dense_gflops']
        if DENSE in runs:
            rows.append([f'{DENSE}, same seeds', '', '1.000', '',
                         f'{runs[DENSE].mean(swept_seeds(each)):.2f}'])
        rows.append([name, 'all kept', f'{found[0]["gflops"] / dense:.3f}',
                     '0 %', f'{found[0]["score"]:.2f}', ''])
        by_order = {(row['order'], row['capacity']): row for row in found}
        for (order, capacity), row in by_order.items():
            if order != 'batch prioritised':
                continue
            first = by_order['first come', capacity]
            rows.append([
                name, f'{capacity:g}', f'{row["gflops"] / dense:.3f}',
                f'{100 * row["skipped"]:.0f} %', f'{first["score"]:.2f}',
                f'{row["score"]:.2f}'])
    return markdown(
        ('model', 'capacity', 'operations over dense', 'tokens skipped',
         'first come', 'batch prioritised'),
        [row + [''] * (6 - len(row)) for row in rows])


def times(runs: Mapping[str, Runs]) -> str:
    """The table of score, operations and time at each capacity, with Batch
    Prioritized Routing, beside a dense model and beside the order of the image.
    Operations and times are over those of a pass through the dense cores of
    the same model."""
    rows = []
    for name, each in runs.items():
        for row in timed(each) if sweeps(each) else ():
            capacity = row['capacity']
            mine = swept(each, row['order'], capacity)
            rows.append([
                name, f'{capacity:g}' if capacity else 'all kept',
                f'{100 * row["skipped"]:.0f} %', f'{row["score"]:.2f}',
                gain(mine, runs['dense']),
                gain(mine, swept(each, 'first come', capacity))
                if capacity else '',
                f'{row["operations"]:.3f}', f'{row["time"]:.3f}'])
    return markdown(
        ('model', 'capacity', 'tokens skipped', 'batch prioritised',
         'over dense', 'over first come', 'operations over dense',
         'time over dense'), rows)


def specialisation(runs: Mapping[str, Runs]) -> str:
    """The table of mutual information in bits by layer, as means over seeds,
    each with the value that is expected by chance."""
    rows = []
    for name, each in runs.items():
        found = [one['layers'] for one in specialised(each)]
        for layer in found[0] if found else ():
            of_layer = [one[layer] for one in found]
            rows.append([name, layer, *(
                f'{average(of_layer, about, "bits"):.2f} / '
                f'{average(of_layer, about, "chance"):.2f}'
                for about in ('class', 'place', 'class | place')),
                f'{100 * average(of_layer, "class", "share_of_target"):.0f} %'
            ])
    return markdown(
        ('model', 'layer', 'class', 'place', 'class, place known',
         'of what there is to know about the class'), rows)


def average(layers: Sequence[Mapping], about: str, what: str) -> float:
    return sum(layer[about][what] for layer in layers) / len(layers)
