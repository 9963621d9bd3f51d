"""How much time MoE costs, as ratios within one run.

    python tools/analysis_tools/benchmark.py layer
    python tools/analysis_tools/benchmark.py backbone --size 512 --batch 2

Contenders take turns and the median counts, so that a noisy machine disturbs
all of them alike.
"""
import argparse
import json
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from rmoe.moe import MoEFFN
from rmoe.registry import MODELS

LAYER_SIZES = ((2048, 384, 8), (512, 768, 8), (8192, 384, 8),
               (32768, 192, 8), (8192, 384, 32))
SWIN_MOE = dict(layers=((), (), (1, 3, 5), (1, )), num_experts=8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--json', metavar='FILE', help='write the table too')
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('layer', help='MoE layer over the dense FFN')
    backbone = commands.add_parser(
        'backbone', help="Swin-MoE and dense SwinMoE over mmseg's Swin")
    backbone.add_argument('--size', type=int, default=512)
    backbone.add_argument('--batch', type=int, default=2)
    args = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    print(f'torch {torch.__version__}, {device}, {platform.processor()}, '
          f'{torch.get_num_threads()} threads, median of {args.repeats}')
    rows = (benchmark_layer(args.repeats, device) if args.command == 'layer'
            else benchmark_backbone(args.repeats, device, args.size,
                                    args.batch))
    print_table(rows)
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(rows, file, indent=1)


def benchmark_layer(repeats: int, device: str) -> list[dict]:
    """Time over the dense FFN of the same width, K = 1."""
    rows = []
    for tokens, dim, experts in LAYER_SIZES:
        models: dict[str, nn.Module] = {
            'dense': FFN(dim, 4 * dim, act_cfg=dict(type='GELU'))}
        for name, options in (('no core', dict(core=False)),
                              ('core', {}), ('rank 16', dict(rank=16))):
            models[name] = MoEFFN(dim, 4 * dim, experts, **options)
            models[name].router.loss_weights = {}
        spread_load(models.values())
        x = torch.randn(tokens, dim, device=device)
        for mode in ('forward+backward', 'forward'):
            seconds = interleave(
                {name: step(model.to(device), x, mode)
                 for name, model in models.items()}, repeats)
            rows.append({
                'T': tokens, 'D': dim, 'E': experts, 'measured': mode,
                'dense ms': round(1e3 * seconds['dense'], 2),
                **{name: round(seconds[name] / seconds['dense'], 2)
                   for name in models if name != 'dense'}})
    return rows


def spread_load(models) -> None:
    """Routers that use every expert about equally on random tokens."""
    for model in models:
        if isinstance(model, MoEFFN):
            nn.init.normal_(model.router.scorer.weight, std=1.)


def benchmark_backbone(repeats: int, device: str, size: int,
                       batch: int) -> list[dict]:
    """Swin-T, time over mmseg's SwinTransformer on the same weights."""
    from mmseg.models.backbones import SwinTransformer
    init_default_scope('mmseg')
    models = {
        "mmseg's SwinTransformer": SwinTransformer(drop_path_rate=0.),
        'SwinMoE, dense': MODELS.build(
            dict(type='rmoe.SwinMoE', drop_path_rate=0.)),
        'SwinMoE, E=8': MODELS.build(
            dict(type='rmoe.SwinMoE', drop_path_rate=0.,
                 moe=dict(SWIN_MOE, router=dict(type='TokenChoiceRouter',
                                                loss_weights={}))))}
    x = torch.randn(batch, 3, size, size, device=device)
    rows = []
    for mode in ('forward+backward', 'forward'):
        seconds = interleave({name: step(model.to(device), x, mode)
                              for name, model in models.items()}, repeats)
        base = seconds["mmseg's SwinTransformer"]
        rows += [{'backbone': name, 'measured': mode, 'image': size,
                  'batch': batch, 'ms': round(1e3 * value, 1),
                  'ratio': round(value / base, 3)}
                 for name, value in seconds.items()]
    return rows


def step(model: nn.Module, x: Tensor, mode: str) -> Callable[[], None]:
    """One forward in evaluation, or forward and backward in training."""

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(x)

    def forward_backward() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        outs = model(x.detach().requires_grad_())
        outs = outs if isinstance(outs, (tuple, list)) else [outs]
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])

    return forward if mode == 'forward' else forward_backward


def interleave(steps: dict[str, Callable[[], None]],
               repeats: int) -> dict[str, float]:
    """Median seconds of each step; all take turns, after two warm-ups."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, run in steps.items():
            synchronize()
            begin = time.perf_counter()
            run()
            synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_table(rows: list[dict]) -> None:
    columns = list(rows[0])
    widths = [max(len(str(row[column])) for row in [*rows, {column: column}])
              for column in columns]
    for row in [{column: column for column in columns}, *rows]:
        print('  '.join(str(row[column]).ljust(width)
                        for column, width in zip(columns, widths)))


if __name__ == '__main__':
    main()
