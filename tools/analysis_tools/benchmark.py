"""Measure how much time and memory MoE costs, as ratios within one run.

    python tools/analysis_tools/benchmark.py layer
    python tools/analysis_tools/benchmark.py routers
    python tools/analysis_tools/benchmark.py backbone \\
        --preset swin-tiny cvt-13 vit-small-p16 --size 512 --batch 2
    python tools/analysis_tools/benchmark.py train-step --batch 2 8
    python tools/analysis_tools/benchmark.py inference
    python tools/analysis_tools/benchmark.py fold
    python tools/analysis_tools/benchmark.py memory
    python tools/analysis_tools/benchmark.py peers

The variants that are compared run in turns, and the median time of each is
shown, so that other work on the machine disturbs all of them alike. On a GPU
everything is measured in bfloat16 (autocast), TF32 and float32 (--precision).
"operators" is the number of operators that PyTorch dispatches in a run, without
views and allocations; "host syncs" is how often the CPU waits for the GPU.
"""
import argparse
import json
import platform
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

# rmoe must be imported before mmcv, which is imported below and may not have
# its compiled operators: rmoe then stands in for them.
import rmoe  # noqa: F401, I001
import torch
from _bench import folding, inference, layers, peers, precision, routers
from _bench.layers import Size
from _bench.memory import benchmark_memory
from _bench.models import (
    PRESET_NAMES,
    benchmark_backbone,
    benchmark_train_step,
)
from _bench.precision import PRECISIONS
from _bench.tables import format_table
from _bench.timing import DEVICE, Row
from _bench.training import CONFIG
from _config import run
from _steps import versions

from rmoe.backbones import PRESETS
from rmoe.engine.memory import keep_freed_memory


def main() -> None:
    args = parse_args()
    if args.repeats < 1:
        raise ValueError(f'--repeats {args.repeats} must be at least 1')
    if DEVICE == 'cpu':
        keep_freed_memory()  # tools/train.py does so too.
    print(f'{machine()}, median of {args.repeats}')
    found = dict(machine=machine(), versions=versions(), command=args.command,
                 repeats=args.repeats, tables=[])
    for rows in measure(args):
        print(format_table(rows), end='\n\n', flush=True)
        found['tables'].append(rows)
        # The file is written after each table, so that a benchmark that is
        # stopped leaves its first tables.
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1))


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the tables of a command in one precision after the other."""
    for name in args.precision:
        with precision.use(name):
            for rows in args.measure(args):
                yield [{'precision': name, **row} for row in rows]


def machine() -> str:
    name = (torch.cuda.get_device_name() if DEVICE == 'cuda' else
            f'{platform.processor() or platform.machine()} '
            f'{torch.backends.cpu.get_cpu_capability()}')
    return (f'torch {torch.__version__}, {DEVICE}, {name}, '
            f'{torch.get_num_threads()} threads')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    layer = add(commands, 'layer', measure_layer,
                'MoE layers over the dense FFN, and the limit of the machine')
    add_layers(layer, layers.SIZES)
    layer.add_argument('--growth', type=int, nargs='+', metavar='E',
                       default=list(layers.GROWTH),
                       help='numbers of experts; such layers are measured '
                       'with 256 tokens for each expert')
    router = add(commands, 'routers', measure_routers,
                 'each router alone, and Soft MoE against its own matrix '
                 'products')
    router.add_argument('--layer', type=size_of, metavar='T,D,E',
                        default=routers.SIZE, help='tokens, width, experts')
    router.add_argument('--images', type=int, default=8,
                        help='number of images to which the tokens belong')
    backbone = add(commands, 'backbone', measure_backbone,
                   'backbones over their dense twins')
    backbone.add_argument('--preset', nargs='+', choices=PRESETS,
                          default=PRESET_NAMES, metavar='NAME',
                          help='see docs/backbones.md')
    add_images(backbone)
    for name, measure, text in (
            ('train-step', measure_train_step, 'a segmentor in each stage of '
             'training over its dense twin'),
            ('memory', measure_memory, "peak memory of a segmentor's "
             'training step over its dense twin')):
        command = add(commands, name, measure, text)
        command.add_argument('--config', default=CONFIG,
                             help='config of a MoE segmentor; by default '
                             'Swin-T-MoE + UPerNet')
        add_images(command, several=name == 'train-step')
    infer = add(commands, 'inference', measure_inference,
                'folded experts, and dropping tokens')
    add_layers(infer, inference.SIZES)
    infer.add_argument('--images', type=int, default=2,
                       help='number of images to which the tokens belong')
    folds = add(commands, 'fold', measure_fold,
                'folded experts over core + residual, in inference')
    add_layers(folds, folding.SIZES)
    folds.add_argument('--preset', nargs='+', choices=PRESETS,
                       default=['swin-tiny'], metavar='NAME',
                       help='see docs/backbones.md')
    add_images(folds)
    peer = add(commands, 'peers', measure_peers,
               "other projects' MoE layers, and mmseg's Swin")
    add_layers(peer, peers.SIZES)
    peer.add_argument('--images', type=int, default=1,
                      help='number of images to which the tokens belong')
    add_images(peer)
    # The common options are also accepted before the command, as in earlier
    # versions.
    add_common(parser, repeats=15, json=None,
               precision=list(precision.DEFAULTS))
    return parser.parse_args()


def add(commands, name: str, measure, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(measure=measure)
    add_common(command, *3 * [argparse.SUPPRESS])
    return command


def add_common(parser: argparse.ArgumentParser, repeats, json, precision
               ) -> None:
    parser.add_argument('--repeats', type=int, default=repeats)
    parser.add_argument('--precision', nargs='+', default=precision,
                        choices=PRECISIONS, help='by default all on a GPU, '
                        'and float32 on the CPU')
    parser.add_argument('--json', metavar='FILE', default=json,
                        help='also write the tables to this file')


def add_layers(parser: argparse.ArgumentParser, sizes: tuple[Size, ...]
               ) -> None:
    parser.add_argument('--layers', type=size_of, nargs='+', default=sizes,
                        metavar='T,D,E', help='tokens, width, experts')


def add_images(parser: argparse.ArgumentParser, several: bool = False
               ) -> None:
    """Add --size and --batch. With ``several`` they take lists, and there is a
    table for each size with each batch."""
    for name, default, text in (('--size', 512, 'side of the square images'),
                                ('--batch', 2, 'number of images')):
        if several:
            parser.add_argument(name, type=int, nargs='+', default=[default],
                                help=f'{text}; there is a table for each')
        else:
            parser.add_argument(name, type=int, default=default, help=text)


def size_of(text: str) -> Size:
    try:
        tokens, dim, experts = map(int, text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not tokens,width,experts such as 2048,384,8'
        ) from None
    return tokens, dim, experts


def measure_layer(args: argparse.Namespace) -> Iterator[list[Row]]:
    yield layers.benchmark_layers(args.repeats, args.layers)
    yield layers.benchmark_growth(args.repeats, args.growth)


def measure_routers(args: argparse.Namespace) -> Iterator[list[Row]]:
    yield routers.benchmark_routers(args.repeats, args.images, args.layer)
    yield routers.benchmark_soft(args.repeats, args.images, args.layer)


def measure_backbone(args: argparse.Namespace) -> Iterator[list[Row]]:
    for name in args.preset:
        yield benchmark_backbone(args.repeats, name, args.size, args.batch)


def measure_train_step(args: argparse.Namespace) -> Iterator[list[Row]]:
    for size, batch in product(args.size, args.batch):
        yield benchmark_train_step(args.repeats, args.config, size, batch)


def measure_memory(args: argparse.Namespace) -> Iterator[list[Row]]:
    yield benchmark_memory(args.config, args.size, args.batch)


def measure_inference(args: argparse.Namespace) -> Iterator[list[Row]]:
    yield inference.benchmark_folded(args.repeats, args.layers)
    yield inference.benchmark_capacity(args.repeats, args.images, args.layers)


def measure_fold(args: argparse.Namespace) -> Iterator[list[Row]]:
    yield folding.benchmark_folded_layers(args.repeats, args.layers)
    for name in args.preset:
        yield folding.benchmark_folded_backbone(args.repeats, name, args.size,
                                                args.batch)


def measure_peers(args: argparse.Namespace) -> Iterator[list[Row]]:
    yield peers.benchmark_peers(args.repeats, args.layers, args.images)
    if peers.mmseg_is_there():
        yield benchmark_backbone(args.repeats, 'swin-tiny', args.size,
                                 args.batch)


if __name__ == '__main__':
    run(main)
