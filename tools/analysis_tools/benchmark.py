"""How much time MoE costs, as ratios within one run.

    python tools/analysis_tools/benchmark.py layer
    python tools/analysis_tools/benchmark.py routers
    python tools/analysis_tools/benchmark.py backbone \\
        --preset swin-tiny cvt-13 vit-small-p16 --size 512 --batch 2

Contenders take turns and the median counts, so that a noisy machine disturbs
all of them alike.
"""
import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

import torch
from _memory import keep_freed_memory
from mmcv.cnn.bricks.transformer import FFN
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from rmoe.backbones import PRESETS, preset
from rmoe.backbones.swin_moe import ARCHITECTURES
from rmoe.moe import MoEFFN
from rmoe.registry import MODELS

LAYER_SIZES = ((2048, 384, 8), (512, 768, 8), (8192, 384, 8),
               (32768, 192, 8), (8192, 384, 32))
ROUTER_SIZE = (8192, 384, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--json', metavar='FILE', help='write the table too')
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('layer', help='MoE layer over the dense FFN')
    routers = commands.add_parser(
        'routers', help='each router alone, and Soft MoE against its own '
        'matrix products')
    routers.add_argument('--images', type=int, default=8,
                         help='that the 8192 tokens belong to')
    backbone = commands.add_parser(
        'backbone', help='backbones over their dense twins')
    backbone.add_argument('--preset', nargs='+', choices=PRESETS,
                          default=['swin-tiny', 'cvt-13', 'vit-small-p16'],
                          metavar='NAME', help='see docs/backbones.md')
    backbone.add_argument('--size', type=int, default=512)
    backbone.add_argument('--batch', type=int, default=2)
    args = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu':
        keep_freed_memory()  # as tools/train.py does
    print(f'torch {torch.__version__}, {device}, {platform.processor()}, '
          f'{torch.get_num_threads()} threads, median of {args.repeats}')
    if args.command == 'layer':
        tables = [benchmark_layer(args.repeats, device)]
    elif args.command == 'routers':
        tables = [benchmark_routers(args.repeats, device, args.images),
                  benchmark_soft(args.repeats, device, args.images)]
    else:
        tables = [benchmark_backbone(args.repeats, device, args.preset,
                                     args.size, args.batch)]
    if args.command != 'backbone':  # which shows its rows as they come
        for rows in tables:
            print_table(rows)
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(tables, file, indent=1)


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


def benchmark_routers(repeats: int, device: str,
                      images: int) -> list[dict]:
    """Routing alone over the forward pass of the dense FFN, and the layer's
    forward and backward over the FFN's."""
    tokens, dim, experts = ROUTER_SIZE
    dense = FFN(dim, 4 * dim, act_cfg=dict(type='GELU')).to(device)
    layers = {name: MoEFFN(dim, 4 * dim, experts, router=router).to(device)
              for name, router in routers(tokens // images).items()}
    spread_load(layers.values())
    for layer in layers.values():  # no warning that nobody collects losses
        layer.losses = []
    x = torch.randn(images, tokens // images, dim, device=device)

    def route(layer: MoEFFN, training: bool) -> Callable[[], None]:
        def run() -> None:
            layer.router.train(training)
            with torch.set_grad_enabled(training):
                layer.router(x.view(tokens, dim), None, images)
        return run

    seconds = {}
    for what, steps in (
            ('evaluation', {n: route(m, False) for n, m in layers.items()}),
            ('training', {n: route(m, True) for n, m in layers.items()})):
        steps['dense'] = step(dense, x, 'forward')
        times = interleave(steps, repeats)
        seconds[what] = {n: t / times['dense'] for n, t in times.items()}
    steps = {n: step(m, x, 'forward+backward') for n, m in layers.items()}
    steps['dense'] = step(dense, x, 'forward+backward')
    times = interleave(steps, repeats)
    return [{'router': name, 'routing, evaluation':
             round(seconds['evaluation'][name], 3),
             'routing, training': round(seconds['training'][name], 3),
             'layer forward+backward': round(times[name] / times['dense'], 2)}
            for name in layers]


def routers(tokens_per_image: int) -> dict[str, dict]:
    experts = ROUTER_SIZE[2]
    return {
        'softmax token choice': dict(type='TokenChoiceRouter'),
        'the same, capacity 1, batch prioritised': dict(
            type='TokenChoiceRouter', capacity_factor=1.,
            eval_capacity_factor=1., priority='bpr'),
        'Sinkhorn token choice': dict(type='SinkhornTokenChoiceRouter'),
        'softmax expert choice': dict(type='ExpertChoiceRouter'),
        'Sinkhorn expert choice': dict(type='SinkhornExpertChoiceRouter'),
        'sparse expert choice': dict(type='SparseExpertChoiceRouter'),
        'cosine token choice': dict(
            type='TokenChoiceRouter', scorer=dict(type='CosineScorer')),
        'bias-balanced token choice': dict(type='BiasBalancedRouter'),
        'Soft MoE, a slot per token': dict(
            type='SoftRouter', slots_per_expert=tokens_per_image // experts),
        'Soft MoE, a slot per four tokens': dict(
            type='SoftRouter',
            slots_per_expert=tokens_per_image // experts // 4),
    }


def benchmark_soft(repeats: int, device: str, images: int) -> list[dict]:
    """Forward and backward of Soft MoE over the time of its own matrix
    products alone, which take turns with it; the dense FFN for comparison."""
    tokens, dim, experts = ROUTER_SIZE
    hidden, size = 4 * dim, tokens // images
    x = torch.randn(images, size, dim, device=device)

    def ffn(rows: int, count: int = 1) -> list[Callable[[], None]]:
        return count * (products(1, rows, dim, hidden, device) +
                        products(1, rows, hidden, dim, device))

    dense = FFN(dim, hidden, act_cfg=dict(type='GELU')).to(device)
    contenders = [('dense FFN', '', dense, ffn(tokens), [])]
    for slots in (size, size // 4):
        logits = products(1, tokens, dim, slots, device)
        # dispatch: slots from tokens; combine: tokens from slots
        mixing = (products(images, slots, size, dim, device) +
                  products(images, size, slots, dim, device))
        on_slots = ffn(images * slots // experts, experts)
        for align, more in (('none', []), (
                'difference', ffn(images * slots) + ffn(tokens))):
            layer = MoEFFN(
                dim, hidden, experts, align=align, core=align != 'none',
                router=dict(type='SoftRouter',
                            slots_per_expert=slots // experts)).to(device)
            contenders.append((f"Soft MoE, align='{align}'", slots / size,
                               layer, mixing + on_slots + more, logits))
    rows = []
    for name, slots_per_token, layer, own, logits in contenders:
        times = interleave({'layer': step(layer, x, 'forward+backward'),
                            'own': partial(run_all, own),
                            'logits': partial(run_all, logits)}, repeats)
        rows.append({
            'forward+backward': name, 'slots per token': slots_per_token,
            'ms': round(1e3 * times['layer'], 1),
            'over its products': round(
                times['layer'] / (times['own'] + times['logits']), 2),
            'the logits product not counted': round(
                times['layer'] / times['own'], 2)})
    return rows


def products(batch: int, rows: int, inner: int, columns: int,
             device: str) -> list[Callable[[], None]]:
    """The three products of a linear map, forward and backward."""
    def matrix(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device)

    left, right, out = (matrix(rows, inner), matrix(inner, columns),
                        matrix(rows, columns))
    left_grad, right_grad = torch.empty_like(left), torch.empty_like(right)
    return [lambda: torch.bmm(left, right, out=out),
            lambda: torch.bmm(out, right.mT, out=left_grad),
            lambda: torch.bmm(left.mT, out, out=right_grad)]


def run_all(steps: list[Callable[[], None]]) -> None:
    for each in steps:
        each()


def spread_load(models) -> None:
    """Routers that use every expert about equally on random tokens."""
    for model in models:
        if isinstance(model, MoEFFN) and hasattr(
                getattr(model.router, 'scorer', None), 'weight'):
            nn.init.normal_(model.router.scorer.weight, std=1.)


def benchmark_backbone(repeats: int, device: str, names: list[str],
                       size: int, batch: int) -> list[dict]:
    """Time of presets over that of their dense twins; for Swin V1 mmseg's
    own is measured too."""
    init_default_scope('mmseg')
    x = torch.randn(batch, 3, size, size, device=device)
    rows = []
    for name in names:
        moe = preset(name)
        twin = MODELS.build(dict(moe, moe=None))
        models = {'dense twin': twin, 'MoE': MODELS.build(moe)}
        spread_load(models['MoE'].modules())
        if name.removeprefix('swin-') in ARCHITECTURES:
            models["mmseg's"] = MODELS.build(dict(
                type='mmseg.SwinTransformer', depths=twin.depths,
                embed_dims=twin.num_features[0],
                num_heads=ARCHITECTURES[moe['arch']][2]))
        for mode in ('forward', 'forward+backward'):
            seconds = interleave({kind: step(model.to(device), x, mode)
                                  for kind, model in models.items()}, repeats)
            rows += [{'backbone': name, 'kind': kind, 'measured': mode,
                      'image': size, 'batch': batch,
                      'ms': round(1e3 * value, 1),
                      'ratio': round(value / seconds['dense twin'], 3)}
                     for kind, value in seconds.items()]
        print_table(rows[-2 * len(models):])
        del models, twin, seconds  # before the next are built
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
