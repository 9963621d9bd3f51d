"""Measure how much compute a trained MoE model can give up: evaluate it at
several capacities, filled by first come and by Batch Prioritized Routing.

    python tools/analysis_tools/capacity_sweep.py CONFIG CHECKPOINT

Prints a table, and draws the score against the FLOPs of the backbone and
against its time (capacity_sweep.png in the work dir). It names the smallest
capacity that keeps 99 % of the score of the unchanged model (V-MoE, 2106.05974,
section 4). Times are medians over runs on the first test image, in which the
MoE model and its dense cores take turns. Nothing else should run meanwhile.
Tokens whose experts are full are skipped (--unrouted zero), as in the paper.
If the core served them (--unrouted core), they would cost as much as before.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

import torch
from _bench.timing import interleave
from _config import add_common_arguments, run
from _evaluation import METRICS, main_score, test_runner
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from torch import Tensor, nn

from rmoe.moe import MoEFFN, TokenChoiceRouter, moe_layers
from rmoe.moe.complexity import complexity
from rmoe.moe.recording import record_routing

CAPACITIES = (.1, .2, .3, .4, .5, .6, .7, .8, .9, 1., 1.25, 1.5, 2.)
FIRST_COME, PRIORITISED = 'first come', 'batch prioritised'
EXPERTS_CHOOSE = 'expert choice'
KEEP = 0.99


def main() -> None:
    args = parse_args()
    if min(args.capacities) <= 0:
        raise ValueError(f'--capacities {args.capacities} must be positive')
    if args.repeats < 1:
        raise ValueError(f'--repeats {args.repeats} must be at least 1')
    runner = test_runner(args)
    rows = sweep(runner, sorted(args.capacities), args.unrouted, args.metric,
                 args.repeats)
    print(table(rows))
    kept = {order: smallest_capacity(rows, order) for order in
            dict.fromkeys(row['order'] for row in rows[1:])}
    for order, capacity in kept.items():
        print(f'{order}: capacity {capacity} keeps {100 * KEEP:.0f} % of the '
              'score' if capacity else f'{order}: no capacity of these keeps '
              f'{100 * KEEP:.0f} % of the score')
    folder = Path(runner.work_dir)
    (folder / 'capacity_sweep.json').write_text(json.dumps(
        dict(config=args.config, checkpoint=args.checkpoint,
             unrouted=args.unrouted, rows=rows, kept=kept), indent=1))
    draw(rows, folder / 'capacity_sweep.png', Path(args.config).stem)
    print(f'wrote {folder / "capacity_sweep.png"} and capacity_sweep.json')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a MoE model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--capacities', type=float, nargs='+',
                        default=CAPACITIES, metavar='C')
    parser.add_argument('--unrouted', choices=['zero', 'core'],
                        default='zero',
                        help='what serves a token for which no expert has '
                        'room: nothing (zero) or the core')
    parser.add_argument('--metric', help='key of the evaluator; by default '
                        'the first found of ' + ', '.join(METRICS))
    parser.add_argument('--repeats', type=int, default=21,
                        help='number of timed passes of each setting')
    add_common_arguments(parser)
    return parser.parse_args()


def sweep(runner: Runner, capacities: list[float], unrouted: str,
          metric: str | None, repeats: int) -> list[dict]:
    """Evaluate the model at each capacity.

    Returns:
        A row for each order and capacity. The first row is the reference: the
        model as configured, except that token-choice routers drop nothing.
    """
    layers = moe_layers(runner.model).values()
    routers = [layer.router for layer in layers]
    fixed = {type(router).__name__ for router in routers
             if not hasattr(router, 'eval_capacity_factor')}
    if fixed or not routers:
        raise ValueError(
            f'the routers {sorted(fixed)} of the model have no capacity to '
            'change' if fixed else 'the model has no MoE layer')
    if unrouted == 'core' and any(layer.core is None for layer in layers):
        raise ValueError('--unrouted core needs a model with core=True')
    orders = [FIRST_COME, PRIORITISED]
    if not all(isinstance(router, TokenChoiceRouter) for router in routers):
        orders = [EXPERTS_CHOOSE]
    plan = [('reference', None)] + [
        (order, capacity) for order in orders for capacity in capacities]
    rows: list[dict] = []
    for number, (order, capacity) in enumerate(plan, 1):
        print(f'[{number}/{len(plan)}] {order}'
              + (f', capacity {capacity}' if capacity else ''), flush=True)
        for layer in layers:
            set_capacity(layer, order, capacity, unrouted)
        score = main_score(runner.test(), metric)
        rows.append(dict(order=order, capacity=capacity, score=score,
                         **cost(runner), **times(runner, repeats)))
    if all(layer.core is not None for layer in layers):
        for layer in layers:
            layer.core_only = True
        rows[0]['dense_gflops'] = cost(runner)['gflops']
    return rows


@torch.no_grad()
def times(runner: Runner, repeats: int) -> dict[str, float]:
    """The milliseconds that the backbone takes for the first test image, and
    those of its dense cores, if it has them. The two are run in turns."""
    image = first_image(runner)
    backbone: nn.Module = runner.model.backbone.eval()
    layers = moe_layers(backbone).values()

    def forward(core_only: bool) -> None:
        for layer in layers:
            layer.core_only = core_only
        backbone(image)

    steps = {'milliseconds': partial(forward, False)}
    if all(layer.core is not None for layer in layers):
        steps['dense_milliseconds'] = partial(forward, True)
    seconds = interleave(steps, repeats)
    for layer in layers:
        layer.core_only = False
    return {name: 1e3 * value for name, value in seconds.items()}


def set_capacity(layer: MoEFFN, order: str, capacity: float | None,
                 unrouted: str) -> None:
    router = layer.router
    if capacity is None:
        if isinstance(router, TokenChoiceRouter):
            router.eval_capacity_factor = None
        return
    layer.unrouted = unrouted
    router.eval_capacity_factor = capacity
    # With the default, capacities are rounded up to multiples of 4, which
    # would make several small ones equal.
    router.capacity_multiple = 1
    if isinstance(router, TokenChoiceRouter):
        # Tutel's rule for the capacity does not allow small ones.
        router.tutel_compat = False
        router.priority = 'bpr' if order == PRIORITISED else 'first_come'


@torch.no_grad()
def cost(runner: Runner) -> dict:
    """The GFLOPs of the backbone and the share of skipped tokens for the first
    test image."""
    image = first_image(runner)
    backbone: nn.Module = runner.model.backbone
    gflops = complexity(backbone, image).flops / 1e9
    backbone.eval()
    with record_routing(backbone) as records:
        backbone(image)
    kept = [routing.kept_per_token() for routings in records.values()
            for routing in routings]
    skipped = torch.cat(kept) == 0 if kept else torch.zeros(1)
    return dict(gflops=gflops, skipped=float(skipped.float().mean()))


def first_image(runner: Runner) -> Tensor:
    data = pseudo_collate([runner.test_dataloader.dataset[0]])
    return runner.model.data_preprocessor(data, False)['inputs']


def smallest_capacity(rows: list[dict], order: str) -> float | None:
    """The smallest capacity such that it and all larger ones keep the score;
    None if there is none."""
    wanted = KEEP * rows[0]['score']
    smallest = None
    for row in reversed([row for row in rows if row['order'] == order]):
        if not row['score'] >= wanted:  # also True if the score is nan
            break
        smallest = row['capacity']
    return smallest


def table(rows: list[dict]) -> str:
    lines = [f'{"order":<20}{"capacity":>9}{"score":>9}{"of full":>9}'
             f'{"GFLOPs":>9}{"skipped":>9}{"ms":>9}{"/ dense":>9}']
    for row in rows:
        dense = row.get('dense_milliseconds')
        ratio = f'{row["milliseconds"] / dense:.3f}' if dense else ''
        lines.append(
            f'{row["order"]:<20}{row["capacity"] or "":>9}'
            f'{row["score"]:>9.4g}'
            f'{row["score"] / max(rows[0]["score"], 1e-12):>9.1%}'
            f'{row["gflops"]:>9.3f}{row["skipped"]:>9.1%}'
            f'{row["milliseconds"]:>9.2f}{ratio:>9}')
    return '\n'.join(lines)


def draw(rows: list[dict], path: Path, title: str) -> None:
    figure = Figure((11, 4.5), dpi=110, layout='constrained')
    figure.suptitle(title, fontsize=8)
    left, right = figure.subplots(1, 2, sharey=True)
    full = rows[0]
    draw_against(left, rows, [row['gflops'] for row in rows],
                 'GFLOPs of the backbone, one image')
    if 'dense_gflops' in full:
        left.axvline(full['dense_gflops'], color='black', linestyle='--',
                     linewidth=1, label='dense backbone')
    if 'dense_milliseconds' in full:
        draw_against(right, rows, [
            row['milliseconds'] / row['dense_milliseconds'] for row in rows],
            'time of the backbone over its dense cores')
        right.axvline(1., color='black', linestyle='--', linewidth=1)
    else:
        draw_against(right, rows, [row['milliseconds'] for row in rows],
                     'milliseconds of the backbone, one image')
    left.set_ylabel('score')
    left.legend(fontsize=8)
    figure.savefig(path)


def draw_against(axes: Axes, rows: list[dict], costs: list[float],
                 label: str) -> None:
    for order, marker in ((FIRST_COME, 'o'), (PRIORITISED, 's'),
                          (EXPERTS_CHOOSE, 'o')):
        points = [(cost, row['score'], row['capacity'])
                  for cost, row in zip(costs, rows) if row['order'] == order]
        if not points:
            continue
        axes.plot([point[0] for point in points],
                  [point[1] for point in points], marker=marker, label=order)
        for cost, score, capacity in points:
            axes.annotate(f'{capacity:g}', (cost, score), fontsize=7,
                          xytext=(3, -9), textcoords='offset points')
    axes.axhline(KEEP * rows[0]['score'], color='grey', linestyle=':',
                 label=f'{100 * KEEP:.0f} % of the full score')
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


if __name__ == '__main__':
    run(main)
