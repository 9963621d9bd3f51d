"""Compute how much memory and communication a training needs on each GPU, for
each way to spread it over several.

    python tools/analysis_tools/plan_parallel.py CONFIG --gpus 8 --memory 80
    python tools/analysis_tools/plan_parallel.py CONFIG --gpus 16 64 --amp

For data parallel, sharded and expert parallel training, and for the last two
together, it shows the memory of the GPU that needs most, the bytes that this
GPU sends in a step, and the time that the sending takes by itself. It needs
neither GPUs nor data, nor memory for the weights. docs/scaling.md says what is
counted, measured and assumed.
"""
import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))
sys.path.insert(0, str(TOOLS / 'analysis_tools'))

from _bench.tables import format_table
from _config import run
from _plan.activations import Activations, Run, experts_of, find
from _plan.layouts import Layout, Memory, layouts, memory, units
from _plan.model import (
    Parameter,
    build,
    image_size,
    moment_bytes,
    set_stage,
    stages_of,
)
from _plan.traffic import Links, Rows, Traffic, traffic
from mmengine.config import Config, DictAction

from rmoe.moe import moe_layers
from rmoe.registry import type_name

GB = 1e9
# The share of a GPU's memory that is planned with. The rest is for temporary
# tensors, for gaps that the allocator cannot use, and for the libraries.
USABLE = 0.9


@dataclass(frozen=True)
class Option:
    """A layout on a number of GPUs, with its memory and communication."""
    gpus: int
    layout: Layout
    memory: Memory
    traffic: Traffic

    def fits(self, available: float) -> bool:
        """Whether it fits into a GPU with so many bytes of memory."""
        return self.memory.total <= USABLE * available


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--gpus', type=int, nargs='+', default=[8],
                        help='number of all GPUs; several numbers make a '
                        'table each')
    parser.add_argument('--memory', type=float, default=80,
                        help='memory of each GPU in GB')
    parser.add_argument('--gpus-per-node', type=int, default=8)
    parser.add_argument('--link', type=float, default=300, metavar='GB/s',
                        help='rate at which a GPU sends to others of its '
                        'node; the default is that of NVLink on an A100')
    parser.add_argument('--node-link', type=float, default=200,
                        metavar='GB/s', help='rate at which a node sends to '
                        'others, for all its network adapters together; the '
                        'default is that of eight adapters of 200 Gbit/s')
    parser.add_argument('--device', choices=('gpu', 'cpu'), default='gpu',
                        help='the device whose implementation of MoE layers '
                        'is assumed')
    parser.add_argument('--amp', action='store_true',
                        help='compute in bfloat16, with float32 weights and '
                        'moments; the default is what the config says')
    parser.add_argument('--batch-size', type=int,
                        help="images per GPU; the default is the config's")
    parser.add_argument('--image-size', type=int, nargs='+',
                        metavar='PIXELS', help='a side, or height and width; '
                        "the default is the config's")
    parser.add_argument('--expert-parallel', type=int, metavar='N',
                        help='number of GPUs that share the experts; the '
                        "default is the config's, or as many as possible "
                        'inside a node')
    parser.add_argument('--optimizer', metavar='TYPE',
                        help="the default is the config's")
    parser.add_argument('--json', metavar='FILE',
                        help='write the numbers, in bytes and seconds')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of the config')
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    check(args)
    plan(cfg, args)


def check(args: argparse.Namespace) -> None:
    """Raise for numbers that make no sense, such as a negative memory."""
    for name in ('memory', 'gpus_per_node', 'link', 'node_link',
                 'batch_size', 'expert_parallel'):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f'--{name.replace("_", "-")} {value} must be '
                             'greater than 0')
    for gpus in args.gpus:
        if gpus < 1:
            raise ValueError(f'--gpus {gpus} must be at least 1')
        if gpus > args.gpus_per_node and gpus % args.gpus_per_node:
            raise ValueError(
                f'--gpus {gpus} are not a whole number of nodes with '
                f'{args.gpus_per_node} GPUs each: set --gpus-per-node to a '
                'divisor')
    if args.image_size and (len(args.image_size) > 2
                            or min(args.image_size) < 1):
        raise ValueError(f'--image-size {args.image_size} must be a side, or '
                         'a height and a width')


def plan(cfg: Config, args: argparse.Namespace) -> None:
    model = build(cfg)
    wrapper = cfg.get('model_wrapper_cfg') or {}
    stages = stages_of(cfg)
    moments = moment_bytes(cfg, args.optimizer)
    bfloat16 = args.amp or wrapper.get('param_dtype') == 'bfloat16' or (
        'Amp' in type_name(cfg.get('optim_wrapper') or {'type': ''}))
    parameters = set_stage(model, stages, bfloat16)
    loader = cfg.get('train_dataloader') or {}
    step = Run(image_size(cfg, args.image_size),
               args.batch_size or loader.get('batch_size', 1), bfloat16,
               args.device == 'gpu', stages)
    whole = experts_of(cfg)
    parts = {gpus: divided(args, wrapper, model, whole, gpus)
             for gpus in args.gpus}
    activations = find(cfg, step, {whole, *(
        whole // count for count in parts.values())})
    rows = rows_of(model, activations)
    print(describe(cfg, args, parameters, moments, step))
    print('activations:')
    for note in activations.notes:
        print(f'  {note}')
    written: list[dict[str, Any]] = []
    for gpus in args.gpus:
        node = min(gpus, args.gpus_per_node)
        links = Links(args.link * GB, args.node_link * GB, node)
        options = [
            option_of(layout, gpus, parameters, moments, step, activations,
                      rows, whole, wrapper, links)
            for layout in layouts(gpus, node, parts[gpus])]
        show(options, args.memory * GB, bfloat16)
        written += [dict(
            gpus=gpus, layout=option.layout.name,
            **{f'{key}_bytes': value
               for key, value in asdict(option.memory).items()},
            total_bytes=option.memory.total,
            fits=option.fits(args.memory * GB),
            sent_parameter_bytes=option.traffic.parameters,
            sent_row_bytes=option.traffic.rows,
            seconds=option.traffic.seconds) for option in options]
    if args.json:
        Path(args.json).write_text(json.dumps(written, indent=1))


def divided(args: argparse.Namespace, wrapper: dict, model: Any, experts: int,
            gpus: int) -> int:
    """The number of GPUs that share the experts of a layer.

    Raises:
        ValueError: if the experts cannot be divided among that many.
    """
    given = args.expert_parallel or wrapper.get('expert_parallel')
    for name, layer in moe_layers(model).items():
        if layer.needs_all_rows and (given or 1) > 1:
            raise ValueError(
                f'--expert-parallel {given} cannot serve {name}, a '
                f'{type(layer).__name__} that looks at the hidden rows of '
                'neighbouring tokens: set it to 1')
        if layer.needs_all_rows:
            return 1
    if not given:
        return max(count for count in range(1, min(
            gpus, args.gpus_per_node) + 1)
            if experts % count == 0 and gpus % count == 0)
    for what, number in ((f'the {experts} experts of a layer', experts),
                         (f'--gpus {gpus}', gpus)):
        if number % given:
            raise ValueError(
                f'--expert-parallel {given} does not divide {what}: '
                'set it to a common divisor of experts and GPUs')
    return given


def rows_of(model: Any, activations: Activations) -> list[Rows]:
    """The rows that the MoE layers of a model would exchange under expert
    parallelism."""
    return [Rows(round(activations.tokens[name]
                       * layer.router.experts_per_token),
                 layer.experts.widths[0], layer.num_experts, layer.with_cp)
            for name, layer in moe_layers(model).items()]


def option_of(layout: Layout, gpus: int, parameters: list[Parameter],
              moments: float, step: Run, activations: Activations,
              rows: list[Rows], experts: int, wrapper: dict, links: Links
              ) -> Option:
    reshard = wrapper.get('reshard_after_forward', True)
    local = experts // layout.experts
    kept = activations.total(local, converted=not layout.ddp)
    return Option(
        gpus, layout,
        memory(parameters, layout, gpus, moments, step.bfloat16, kept,
               reshard, not wrapper.get('gradient_as_bucket_view', False)),
        traffic(units(parameters, layout, gpus, step.bfloat16), layout, rows,
                gpus, step.bfloat16, reshard, links))


def describe(cfg: Config, args: argparse.Namespace,
             parameters: list[Parameter], moments: float, step: Run) -> str:
    def millions(chosen: list[Parameter]) -> str:
        return f'{sum(one.numel for one in chosen) / 1e6:,.1f} M'

    name = args.optimizer or cfg.optim_wrapper.optimizer.type
    return (f'{millions(parameters)} parameters, '
            f'{millions([one for one in parameters if one.experts])} of them '
            f'in experts, {millions([one for one in parameters if one.trains])}'
            f' train at once\n{name} keeps {moments:g} bytes for each; '
            f'{step.batch} images of {step.size[0]}x{step.size[1]} a GPU, in '
            f'{"bfloat16" if step.bfloat16 else "float32"}')


def show(options: list[Option], available: float, bfloat16: bool) -> None:
    gpus = options[0].gpus
    print(f'\n{gpus} GPU{"s" * (gpus > 1)} of {available / GB:g} GB; GB of '
          'each, and what it sends in a step')
    print(format_table([row(option, available) for option in options]))
    fitting = [option for option in options if option.fits(available)]
    if not fitting:
        print('Nothing fits. Try --amp, with_cp=True in the backbone, which '
              'recomputes activations, fewer images a GPU, or more GPUs.')
        return
    chosen = fitting[0]
    print(f'Choose {chosen.layout.name}, the simplest that fits: '
          f'{setting(chosen.layout, bfloat16)}')
    fastest = min(fitting, key=lambda option: option.traffic.seconds)
    if fastest.traffic.seconds < chosen.traffic.seconds:
        print(f'{fastest.layout.name} sends for '
              f'{1e3 * fastest.traffic.seconds:.0f} ms instead of '
              f'{1e3 * chosen.traffic.seconds:.0f}: '
              f'{setting(fastest.layout, bfloat16)}')


def row(option: Option, available: float) -> dict[str, str]:
    return {
        'layout': option.layout.name,
        **{name: f'{count / GB:.2f}' for name, count in asdict(
            option.memory).items()},
        'total': f'{option.memory.total / GB:.1f}',
        'fits': 'yes' if option.fits(available) else 'no',
        'parameters sent': f'{option.traffic.parameters / GB:.2f}',
        'rows sent': f'{option.traffic.rows / GB:.3f}',
        'ms': f'{1e3 * option.traffic.seconds:.0f}'}


def setting(layout: Layout, bfloat16: bool) -> str:
    """The setting in the config for a layout."""
    if layout.wrapper is None:
        return 'no setting needed'
    inside = ["type='rmoe.FullySharded'"]
    inside += [layout.wrapper] if layout.wrapper else []
    inside += ["param_dtype='bfloat16'"] if bfloat16 else []
    return f'model_wrapper_cfg=dict({", ".join(inside)})'


if __name__ == '__main__':
    run(main)
