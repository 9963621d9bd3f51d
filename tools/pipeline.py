"""Run whole pipelines of the RMoE paper (2204.09636), and compare their costs.

    python tools/pipeline.py configs/pipelines/swin-tiny_ade20k-512x512.py \\
        rmoe-i
    python tools/pipeline.py FAMILY non-moe rmoe-d --dense dense.pth
    python tools/pipeline.py FAMILY all --gpus 8

A pipeline is a chain of steps, each a config that starts from the checkpoint
of the step before: non-moe (dense upstream and downstream), moe (experts from
the start), rmoe-d (dense upstream, upcycled downstream), rmoe-i (dense
upstream, upcycled, a short stage on the upstream data, downstream).

If two pipelines begin with the same step, it is trained once. A run that was
stopped continues from its last checkpoint, and finished steps are not repeated.
The costs of every step and of the pipelines, and their scores, are written to
costs.json in the work dir.
"""
import argparse
import json
from pathlib import Path
from typing import Any

from _config import run
from _steps import finish, given, total
from mmengine.config import Config, DictAction

from rmoe.report.scalars import MAIN_SCORES
from rmoe.upcycling import write_atomically

# The step that the checkpoint of --dense replaces.
DENSE = 'dense-upstream'
COLUMNS = ('pipeline', 'score', 'hours', 'samples', 'PFLOPs', 'peak GB',
           'hours / non-moe', 'PFLOPs / non-moe')


def main() -> None:
    args = parse_args()
    family = read_family(args.family)
    names = (list(family.pipelines) if 'all' in args.pipelines
             else args.pipelines)
    for name in names:
        if name not in family.pipelines:
            raise ValueError(f'{name!r} is no pipeline of {args.family}; '
                             f'there are {", ".join(family.pipelines)}')
    options = options_of_steps(args.cfg_options or {}, family.steps)
    if args.dense and not any(family.pipelines[name][0] == DENSE
                              for name in names):
        raise ValueError(f'--dense {args.dense}: none of {names} starts from '
                         'a dense checkpoint. Leave --dense out')
    work_dir = args.work_dir or Path('work_dirs') / args.family.stem
    work_dir.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f'{name}: {" -> ".join(family.pipelines[name])}', flush=True)
        steps = follow(family, name, work_dir, options, args)
        keep(work_dir / 'costs.json', name, steps)
    print(table(json.loads((work_dir / 'costs.json').read_text())))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('family', type=Path,
                        help='config with steps and pipelines, of '
                        'configs/pipelines')
    parser.add_argument('pipelines', nargs='+', metavar='PIPELINE',
                        help="pipelines to run, or 'all'")
    parser.add_argument('--dense', type=Path, metavar='CHECKPOINT',
                        help='a dense checkpoint instead of the step '
                        f'{DENSE}; a cost.json beside it is counted')
    parser.add_argument('--work-dir', type=Path,
                        help='./work_dirs/<family name> if not given')
    parser.add_argument('--gpus', type=int, default=1)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of one step, or of all: '
                        'STEP.key=value or all.key=value, e.g. '
                        'all.randomness.seed=1')
    return parser.parse_args()


def read_family(path: Path) -> Config:
    family = Config.fromfile(path)
    if not ('steps' in family and 'pipelines' in family):
        raise ValueError(f'{path} has no steps and pipelines: name a config '
                         'of configs/pipelines')
    return family


def options_of_steps(options: dict[str, Any], steps: dict[str, str]
                     ) -> dict[str, dict[str, Any]]:
    """The overrides STEP.key=value of the command line, by step."""
    sorted_out: dict[str, dict[str, Any]] = {step: {} for step in steps}
    for key, value in options.items():
        step, _, rest = key.partition('.')
        if (step != 'all' and step not in steps) or not rest:
            raise ValueError(f'--cfg-options {key}: write STEP.key=value '
                             f'with STEP one of {", ".join(steps)}, or all')
        for name in steps if step == 'all' else [step]:
            sorted_out[name][rest] = value
    return sorted_out


def follow(family: Config, name: str, work_dir: Path,
           options: dict[str, dict[str, Any]], args: argparse.Namespace
           ) -> dict[str, dict]:
    """Run the steps of one pipeline, and return their records by name."""
    chain: list[str] = []
    records: dict[str, dict] = {}
    start: str | None = None
    for step in family.pipelines[name]:
        if step == DENSE and args.dense:
            chain.append(args.dense.stem)
            records[step] = given(args.dense)
        else:
            chain.append(step)
            cfg = Config.fromfile(args.family.parent / family.steps[step])
            cfg.merge_from_dict(options[step])
            records[step] = finish(cfg, start, work_dir / '+'.join(chain),
                                   args.gpus)
        start = records[step]['checkpoint']
    return records


def keep(path: Path, name: str, steps: dict[str, dict]) -> None:
    """Write the costs and scores of a pipeline into costs.json."""
    costs = json.loads(path.read_text()) if path.exists() else {}
    score = list(steps.values())[-1]['metrics']
    costs[name] = dict(
        score={key: score[key] for key in MAIN_SCORES if key in score},
        total=total([step['cost'] for step in steps.values()
                     if step['cost']]),
        steps={step: record['cost'] for step, record in steps.items()})
    write_atomically(path, json.dumps(costs, indent=1).encode())


def table(costs: dict[str, dict]) -> str:
    """A table with one line for each pipeline that has been run."""
    rows = [COLUMNS]
    base = costs.get('non-moe', {}).get('total')
    for name, pipeline in costs.items():
        cost = pipeline['total']
        key, score = next(iter(pipeline['score'].items()))
        rows.append((
            name, f'{key} {score:.4g}', f'{cost["seconds"] / 3600:.2f}',
            f'{cost["samples"]:,}', f'{cost["flops"] / 1e15:.4g}',
            f'{cost["peak_memory"] / 1e9:.1f}',
            *(f'{cost[what] / base[what]:.3f}' if base else ''
              for what in ('seconds', 'flops'))))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(
        row, widths)).rstrip() for row in rows)


if __name__ == '__main__':
    run(main)
