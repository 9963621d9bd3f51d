"""Turn a dense checkpoint into a MoE one, or a MoE one into a dense one.

    python tools/upcycle.py dense.pth --config CONFIG --out moe.pth
    python tools/upcycle.py moe.pth --config CONFIG --out dense.pth --to-dense

Reads .pth and .safetensors of mmseg, mmdet, mmpretrain, timm and the original
Swin release; what is in the file is never executed. Beside the output it
writes a report of every key, with the measured difference between the dense
and the MoE model's features on a random image.
"""
import argparse
import ast
import json
from collections import Counter
from copy import deepcopy
from pathlib import Path

import torch
from _config import run
from mmengine.config import Config, DictAction
from mmengine.model import BaseModule
from mmengine.registry import init_default_scope
from torch import Tensor

from rmoe.moe import moe_layers
from rmoe.registry import MODELS
from rmoe.upcycling import (
    Report,
    add_noise,
    fit,
    read_checkpoint,
    state_dict_of,
    to_dense,
    write_atomically,
    write_checkpoint,
)
from rmoe.upcycling.keymaps import find_prefix
from rmoe.version import __version__

BACKBONE = 'backbone.'
CLASSIFIER = 'head.'  # mmpretrain's; a segmentor or detector has no use for it


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='.pth or .safetensors file')
    parser.add_argument('--config', required=True,
                        help='config whose model.backbone is the MoE model')
    parser.add_argument('--out', required=True,
                        help='.pth or .safetensors file to write')
    parser.add_argument('--to-dense', action='store_true',
                        help='keep the core: a file plain mmseg or mmdet '
                        'loads')
    parser.add_argument('--noise', type=float, default=0.,
                        help='deviation of random residuals over that of the '
                        "core's weights, zero mean over experts (default 0: "
                        'the dense function exactly)')
    parser.add_argument('--rank', type=int,
                        help='rank of the residuals, instead of the config')
    parser.add_argument('--layers', type=ast.literal_eval,
                        help='MoE blocks per stage, instead of the config, '
                        'e.g. "((), (), (1, 3, 5), (1,))"')
    parser.add_argument('--seed', type=int, default=0,
                        help='of router, noise and the test image')
    parser.add_argument('--size', type=int, default=224,
                        help='side of the test image in pixels')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of the config')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    moe = build_backbone(args)
    dense = build_backbone(args, dense=True)
    state = state_dict_of(read_checkpoint(args.checkpoint))
    prefix = find_prefix(state)
    if prefix is None:
        fit(moe, state)  # raises, and says what the file is not
    backbone = {key.removeprefix(prefix): value
                for key, value in state.items() if key.startswith(prefix)}
    rest = {key: value for key, value in state.items()
            if not key.startswith((prefix, CLASSIFIER))}
    if args.to_dense:
        result, report = make_dense(moe, dense, backbone)
    else:
        result, report = make_moe(moe, dense, backbone, args)
    difference = largest_difference(dense, moe, args.size)
    for key in state:
        if prefix and key.startswith(CLASSIFIER):
            report.left_out[key] = 'classification head'
    for key in rest:
        report.status[key] = 'copied'
    out = {BACKBONE + key: value for key, value in result.items()} | rest
    write_checkpoint(args.out, out, dict(rmoe_version=__version__))
    changing = {mode: layers_that_change_the_function(moe.train(
        mode == 'training')) for mode in ('training', 'evaluation')}
    write_report(args, report, difference, changing)
    print(report.table())
    print(f'largest difference between dense and MoE features on a random '
          f'{args.size}x{args.size} image: {difference:.3g}')
    for mode, layers in changing.items():
        if layers and not args.to_dense:
            print('warning: by its configuration the MoE model does not '
                  f'compute the dense function in {mode}: {layers}')
    print(f'wrote {args.out} and {report_path(args.out)}')


def build_backbone(args: argparse.Namespace,
                   dense: bool = False) -> BaseModule:
    """The config's backbone, on the CPU, without its pretrained weights."""
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    init_default_scope(cfg.get('default_scope', 'rmoe'))
    backbone = deepcopy(cfg.model.backbone)
    backbone.init_cfg = None
    if not backbone.get('moe'):
        raise ValueError(f'{args.config} has no model.backbone.moe: it is a '
                         'dense model')
    if args.rank is not None:
        backbone.moe.rank = args.rank
    if args.layers is not None:
        backbone.moe.layers = args.layers
    if dense:
        backbone.moe = None
    model = MODELS.build(backbone)
    model.init_weights()
    return model.eval()


def make_moe(moe: BaseModule, dense: BaseModule, state: dict[str, Tensor],
             args: argparse.Namespace) -> tuple[dict[str, Tensor], Report]:
    fitted, report = fit(moe, state)
    if 'upcycled' not in report.status.values():
        raise ValueError(f'{args.checkpoint} is a MoE checkpoint already; '
                         '--to-dense makes it dense')
    moe.load_state_dict(fitted)
    if args.noise:
        add_noise(moe, args.noise, args.seed)
    dense.load_state_dict(state)
    return moe.state_dict(), report


def make_dense(moe: BaseModule, dense: BaseModule, state: dict[str, Tensor]
               ) -> tuple[dict[str, Tensor], Report]:
    fitted, _ = fit(moe, state)
    moe.load_state_dict(fitted)
    result = to_dense(fitted)
    dense_state, report = fit(dense, result)
    dense.load_state_dict(dense_state)
    for key in fitted:
        if key not in result:
            report.left_out[key] = 'router or residual of an expert'
    return dense_state, report


@torch.no_grad()
def largest_difference(dense: BaseModule, moe: BaseModule,
                       size: int) -> float:
    image = torch.randn(1, 3, size, size)
    return max(float((a - b).abs().max())
               for a, b in zip(dense(image), moe(image)))


def layers_that_change_the_function(moe: BaseModule) -> str:
    """Why upcycling alone changes the model in its present mode, even with
    zero residuals; empty if it does not."""
    kinds = Counter(
        f'{type(layer.router).__name__} with align={layer.align!r}, '
        f'unrouted={layer.unrouted!r}, core={layer.experts.core}'
        for layer in moe_layers(moe).values()
        if not layer.preserves_function)
    return '; '.join(f'{count} MoE layers are {kind}'
                     for kind, count in kinds.items())


def report_path(out: str) -> Path:
    return Path(out).with_suffix('.report.json')


def write_report(args: argparse.Namespace, report: Report,
                 difference: float, changing: dict[str, str]) -> None:
    content = dict(
        checkpoint=args.checkpoint, config=args.config, source=report.source,
        to_dense=args.to_dense, noise=args.noise, seed=args.seed,
        largest_feature_difference=difference,
        preserves_function=not any(changing.values()),
        layers_that_change_the_function=changing,
        counts=report.counts(),
        keys=report.status, left_out=report.left_out)
    write_atomically(report_path(args.out),
                     json.dumps(content, indent=1).encode())


if __name__ == '__main__':
    run(main)
