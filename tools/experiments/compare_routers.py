"""Fine-tune one dense checkpoint with every router, equally long, and write
the table that compares them.

    python tools/experiments/compare_routers.py CONFIG DENSE_CHECKPOINT \\
        --out docs/results.md

CONFIG is a MoE config; its router is replaced, and align and unrouted are left
to the router's defaults; everything else stays. The first row goes on without
MoE. A run that has finished is not repeated, unless its config changed. The
table has all finished runs and replaces what stands between the two markers of
the file --out names.
"""
import argparse
import copy
import json
import sys
from pathlib import Path
from statistics import mean, median

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

from _config import run
from _training import last_validation, scalars, train
from mmengine.config import Config, DictAction

DENSE = 'dense, continued'
ROUTERS = {
    'softmax token choice': dict(type='TokenChoiceRouter'),
    'Sinkhorn token choice': dict(type='SinkhornTokenChoiceRouter'),
    'softmax expert choice': dict(type='ExpertChoiceRouter'),
    'Sinkhorn expert choice': dict(type='SinkhornExpertChoiceRouter'),
    'sparse expert choice': dict(type='SparseExpertChoiceRouter'),
    'Soft MoE': dict(type='SoftRouter'),
    'cosine token choice': dict(
        type='TokenChoiceRouter', scorer=dict(type='CosineScorer')),
    'bias-balanced token choice': dict(type='BiasBalancedRouter'),
}
BEGIN, END = '<!-- routers: begin -->', '<!-- routers: end -->'
COLUMNS = ('router', 'mIoU', 'load entropy', 'smallest load / fair share',
           'tokens without expert', 's/iteration')


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.out:
        check_markers(args.out)
    names = args.only or [DENSE, *ROUTERS]
    for number, name in enumerate(names, 1):
        print(f'[{number}/{len(names)}] {name}', flush=True)
        finish(name, args)
    table = to_markdown({name: json.loads(record_of(name, args).read_text())
                         for name in [DENSE, *ROUTERS]
                         if record_of(name, args).exists()})
    print(table)
    if args.out:
        write_between_markers(args.out, table)
        print(f'wrote {args.out}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='MoE config')
    parser.add_argument('checkpoint', help='dense checkpoint')
    parser.add_argument('--work-dir', type=Path,
                        default=Path('work_dirs/routers'))
    parser.add_argument('--out', type=Path,
                        help='file with the markers of the table')
    parser.add_argument('--only', nargs='+', choices=[DENSE, *ROUTERS],
                        metavar='ROUTER', help='some of them: '
                        + ', '.join(repr(name) for name in [DENSE, *ROUTERS]))
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of the config')
    return parser.parse_args()


def record_of(name: str, args: argparse.Namespace) -> Path:
    return (args.work_dir / name.replace(' ', '-').replace(',', '') /
            'result.json')


def finish(name: str, args: argparse.Namespace) -> None:
    """Train, unless the same config has been trained to its end."""
    record = record_of(name, args)
    text = run_config(name, args).pretty_text
    if record.exists() and json.loads(record.read_text()).get('config') == text:
        return
    record.unlink(missing_ok=True)
    folder = record.parent
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / 'run.py'
    config.write_text(text)
    train(config, folder)
    record.write_text(json.dumps(
        dict(config=text, **read_scalars(folder)), indent=1))


def run_config(name: str, args: argparse.Namespace) -> Config:
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if not cfg.model.backbone.get('moe'):
        raise ValueError(f'{args.config} has no model.backbone.moe: name a '
                         'MoE config')
    cfg.load_from = args.checkpoint
    cfg.setdefault('custom_hooks', [])
    if name == DENSE:
        cfg.model.backbone.moe = None
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks
                            if not hook['type'].startswith('rmoe.')]
        return cfg
    cfg.model.backbone.moe.router = copy.deepcopy(ROUTERS[name])
    for option in ('align', 'unrouted'):
        cfg.model.backbone.moe.pop(option, None)
    if ROUTERS[name]['type'] == 'BiasBalancedRouter':
        cfg.custom_hooks.append(dict(type='rmoe.BalanceBiasHook'))
    return cfg


def read_scalars(folder: Path) -> dict:
    """Score, loads of the last window and time of a finished run."""
    lines = scalars(folder)
    result = dict(mIoU=last_validation(folder)['mIoU'])
    # Median: an iteration that something disturbed does not count.
    times = [line['time'] for line in lines if 'loss' in line]
    result['time'] = median(times[len(times) // 2:])
    loads = [line for line in lines
             if any(key.endswith('/entropy') for key in line)]
    if loads:
        result.update(summarise_loads(loads[-1]))
    return result


def summarise_loads(scalars: dict) -> dict:
    """Over all layers of the last window."""
    shares: dict[str, list[float]] = {}
    for key, value in scalars.items():
        layer, _, what = key.rpartition('/')
        if what.startswith('load_'):
            shares.setdefault(layer, []).append(value)
    return dict(
        entropy=mean(value for key, value in scalars.items()
                     if key.endswith('/entropy')),
        unrouted=mean(value for key, value in scalars.items()
                      if key.endswith('/unrouted')),
        smallest_load=min(min(loads) * len(loads)
                          for loads in shares.values()))


def to_markdown(results: dict[str, dict]) -> str:
    rows = [COLUMNS, ['---'] * len(COLUMNS)]
    for name, result in results.items():
        loads = ['', '', ''] if 'entropy' not in result else [
            f'{result["entropy"]:.3f}', f'{result["smallest_load"]:.2f}',
            f'{100 * result["unrouted"]:.1f} %']
        rows.append([name, f'{result["mIoU"]:.2f}', *loads,
                     f'{result["time"]:.2f}'])
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def check_markers(path: Path) -> None:
    text = path.read_text() if path.exists() else ''
    if text.count(BEGIN) != 1 or text.count(END) != 1 or (
            text.index(BEGIN) > text.index(END)):
        raise ValueError(f'{path} must exist and have the lines {BEGIN!r} and '
                         f'{END!r}, once and in this order; the table goes '
                         'between them')


def write_between_markers(path: Path, table: str) -> None:
    text = path.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f'{head}{BEGIN}\n{table}\n{END}{tail}')


if __name__ == '__main__':
    run(main)
