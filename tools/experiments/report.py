"""Write the tables of docs/results.md, and draw its pictures, from records.

    python tools/experiments/report.py

Each table replaces the text between its two markers in the file, such as
``<!-- ablation: begin -->`` and ``<!-- ablation: end -->``. A table without
records is not changed.
"""
import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

import _figures
import _tables
from _config import run
from _results import Runs, read
from mmengine.config import Config

ROOT = TOOLS.parent
RECORDS = Path(__file__).resolve().parent / 'records'
Table = Callable[[Mapping[str, Runs]], str]
Draw = Callable[[Mapping[str, Runs], Path], None]


class Report(NamedTuple):
    """A table and, for some, a picture of the records of a plan.

    Attributes:
        plan: the name of the plan.
        table: makes the table.
        draw: draws the picture; None for no picture.
        pipelines: the pipelines of the plan that it shows; None for all.
        analysis: the analysis tool whose results it needs from at least one
            record; None if it needs none.
    """
    plan: str
    table: Table
    draw: Draw | None
    pipelines: Sequence[str] | None = None
    analysis: str | None = None


# The pipelines of the plan 'recipe' in its own table. Most of the other ones
# come in pairs, which show the noise. 'dense-sgd' is so far behind that beside
# it no other difference could be seen in the picture.
RECIPE = ('dense', 'dense-ffn2', 'e1', 'e4', 'e4-half', 'e4-zero-mean',
          'e4-straight', 'e4-clusters', 'e4-no-core', 'e4-averaged',
          'e4-merged', 'e4-shared-moments', 'e8-sqrt', 'e2-cut', 'e8-cut')
LONG = ('dense-long', 'e1-long', 'e4-straight-long')
HEADS = ('head-dense', 'head-e1', 'head-e4')
# The keys are the names of the markers and of the picture.
REPORTS = {
    'rmoe-swin': Report('rmoe-swin', _tables.pipelines, _figures.curves),
    'rmoe-cvt': Report('rmoe-cvt', _tables.pipelines, _figures.curves),
    'rmoe-bccd': Report('rmoe-bccd', _tables.pipelines, _figures.curves),
    'ablation': Report('ablation', _tables.variants, _figures.dots),
    'routers': Report('routers', _tables.routers, _figures.dots),
    'routers-downstream': Report(
        'ablation', _tables.routers, _figures.dots,
        ('non-moe', 'joint', 'sinkhorn-token-choice', 'softmax-expert-choice',
         'sinkhorn-expert-choice', 'sparse-expert-choice', 'soft-moe')),
    'recipe': Report('recipe', _tables.paired, _figures.differences, RECIPE),
    'long': Report('recipe', _tables.paired, None, LONG),
    'heads': Report('recipe', _tables.paired, None, HEADS),
    'mixed': Report('mixed', _tables.data_sets, None),
    'noise': Report('recipe', _tables.noise, None),
    'vmoe': Report('ablation', _tables.capacities, _figures.capacities,
                   analysis='capacity_sweep'),
    'vmoe-time': Report('recipe', _tables.times, _figures.times,
                        ('dense', 'e8-k2'), 'capacity_sweep'),
    'specialisation': Report(
        'ablation', _tables.specialisation, _figures.specialisation,
        analysis='specialisation'),
}


def main() -> None:
    args = parse_args()
    text = args.out.read_text()
    for name, each in REPORTS.items():
        runs = read(args.records / f'{each.plan}.jsonl',
                    each.pipelines or pipelines_of(each.plan))
        if not any(each.analysis in (None, *record.get('analyses', ()))
                   for run in runs.values() for record in run.records.values()):
            print(f'{name}: no records of {each.plan}')
            continue
        text = put(text, name, each.table(runs), args.out)
        if each.draw:
            picture = args.out.parent / 'figures' / f'{name}.png'
            picture.parent.mkdir(exist_ok=True)
            each.draw(runs, picture)
        print(f'{name}: {len(runs)} pipelines')
    args.out.write_text(text)
    print(f'wrote {args.out}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--records', type=Path, default=RECORDS)
    parser.add_argument('--out', type=Path, default=ROOT / 'docs/results.md')
    return parser.parse_args()


def pipelines_of(name: str) -> list[str]:
    """The pipelines of a plan, in the order of the tables."""
    return list(Config.fromfile(
        ROOT / 'configs/experiments' / f'{name}.py').pipelines)


def put(text: str, name: str, table: str, path: Path) -> str:
    """Replace the text between the markers of a table.

    Raises:
        ValueError: unless each marker is there once, the first before the
            second.
    """
    begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
    if text.count(begin) != 1 or text.count(end) != 1 or (
            text.index(begin) > text.index(end)):
        raise ValueError(f'{path} must have the lines {begin!r} and {end!r}, '
                         'once and in this order; the table goes between them')
    return (text[:text.index(begin)] + f'{begin}\n{table}\n' +
            text[text.index(end):])


if __name__ == '__main__':
    run(main)
