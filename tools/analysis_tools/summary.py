"""Count parameters and operations of backbones, with and without experts.

    python tools/analysis_tools/summary.py CONFIG --size 512
    python tools/analysis_tools/summary.py --preset swin-tiny cvt-13
    python tools/analysis_tools/summary.py --preset all --markdown

The weights of the model are never in memory: the operations of the dense twin
are counted without weights, and then one MoE layer of each kind is run on as
many tokens as it gets. A multiply-add is two operations.
"""
import argparse
import sys
from copy import deepcopy
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

import torch
from _config import run
from mmengine.config import Config, DictAction
from torch import nn

from rmoe.backbones import PRESETS, preset
from rmoe.backbones.from_config import (
    backbone_config,
    build_backbone,
    dense_twin,
)
from rmoe.moe import moe_layers
from rmoe.moe.complexity import complexity, inactive_params
from rmoe.upcycling import weightless

COLUMNS = ('backbone', 'image', 'dense M', 'total M', 'active M',
           'dense GFLOPs', 'MoE GFLOPs')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?',
                        help='config whose model.backbone is a MoE model')
    parser.add_argument('--preset', nargs='+', default=[], metavar='NAME',
                        choices=['all', *PRESETS],
                        help="'all', or any of docs/backbones.md")
    parser.add_argument('--size', type=int, default=512,
                        help='side of the image in pixels')
    parser.add_argument('--markdown', action='store_true')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of the config')
    args = parser.parse_args()
    names = list(PRESETS) if 'all' in args.preset else args.preset
    backbones = {name: preset(name) for name in names}
    if args.config:
        cfg = Config.fromfile(args.config)
        if args.cfg_options:
            cfg.merge_from_dict(args.cfg_options)
        backbones[Path(args.config).stem] = backbone_config(cfg)
    if not backbones:
        parser.error('give a config, or --preset')
    width = max(map(len, backbones))
    show(COLUMNS, width, args.markdown)
    if args.markdown:
        print('|' + '---|' * len(COLUMNS))
    for name, backbone in backbones.items():
        show(summarise(name, backbone, args.size), width, args.markdown)


def summarise(name: str, backbone: dict, size: int) -> tuple:
    """The row of one backbone."""
    with weightless():
        dense, moe = (build_backbone(config).to('meta')
                      for config in (dense_twin(backbone), backbone))
    image = torch.empty(1, 3, size, size, device='meta')
    shapes = input_shapes(dense, list(moe_layers(moe)), image)
    cost = complexity(dense, image)
    flops, total = cost.flops, sum(p.numel() for p in moe.parameters())
    active, counted = total, {}
    for key, layer in moe_layers(moe).items():
        active -= inactive_params(layer)
        kind = (shapes[key], layer.experts.num_experts,
                *(p.shape for p in layer.parameters()))
        if kind not in counted:
            counted[kind] = operations(layer, shapes[key]) - complexity(
                dense.get_submodule(key), *inputs(shapes[key], 'meta')).flops
        flops += counted[kind]
    return (name, f'{size}x{size}', f'{cost.total_params / 1e6:.1f}',
            f'{total / 1e6:.1f}', f'{active / 1e6:.1f}',
            f'{cost.flops / 1e9:.1f}', f'{flops / 1e9:.1f}')


def input_shapes(dense: nn.Module, names: list[str], image: torch.Tensor
                 ) -> dict[str, tuple]:
    """The shape of the input of each FFN of the dense twin. SegFormer's FFNs
    also take the height and width, which follow the shape."""
    shapes, handles = {}, []
    for name in names:
        def note(module: nn.Module, args: tuple, name: str = name) -> None:
            shapes[name] = (tuple(args[0].shape), *args[1:2])

        handles.append(dense.get_submodule(name).register_forward_pre_hook(
            note))
    with torch.no_grad():
        dense(image)
    for handle in handles:
        handle.remove()
    return shapes


def inputs(shape: tuple, device: str) -> tuple:
    return (torch.zeros(shape[0], device=device), *shape[1:])


def operations(layer: nn.Module, shape: tuple) -> int:
    """The operations of one MoE layer, which is run with all weights zero."""
    layer = deepcopy(layer).to_empty(device='cpu')
    for parameter in [*layer.parameters(), *layer.buffers()]:
        nn.init.zeros_(parameter)
    return complexity(layer, *inputs(shape, 'cpu')).flops


def show(row: tuple, width: int, markdown: bool) -> None:
    if markdown:
        print('| ' + ' | '.join(row) + ' |', flush=True)
    else:
        print(row[0].ljust(width), *(cell.rjust(12) for cell in row[1:]),
              flush=True)


if __name__ == '__main__':
    run(main)
