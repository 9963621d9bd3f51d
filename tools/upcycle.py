"""Turn a dense checkpoint into a MoE one, or change a MoE one.

    python tools/upcycle.py dense.pth --config CONFIG --out moe.pth
    python tools/upcycle.py timm:NAME --config CONFIG --out moe.pth
    python tools/upcycle.py moe.pth --config CONFIG --out dense.pth --to-dense
    python tools/upcycle.py moe.pth --config CONFIG_WITH_4_EXPERTS \\
        --out moe4.pth --change-experts prune --images FOLDER
    python tools/upcycle.py moe.pth --config CONFIG --out folded.pth --fold

It reads the checkpoints that docs/checkpoints.md lists, and executes no code in
them. Beside the output it writes a report about every key, with the measured
difference between the features before and after the conversion.
"""
import argparse
import ast
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _config import run
from mmengine.config import Config, DictAction
from torch import Tensor, nn

from rmoe.backbones.from_config import (
    backbone_config,
    build_backbone,
    dense_twin,
    load_images,
)
from rmoe.moe import moe_layers
from rmoe.upcycling import (
    Report,
    add_noise,
    choose_weights,
    cluster_routers,
    count_experts,
    fit,
    give_weights,
    largest_difference,
    layers_that_change_the_function,
    measure_loads,
    read_checkpoint,
    to_dense,
    to_plain,
    weightless,
    write_atomically,
    write_checkpoint,
)
from rmoe.upcycling.channels import image_convolution
from rmoe.version import __version__

BACKBONE = 'backbone.'
# The head of a classifier is left out, because a segmentor or detector cannot
# use it.
CLASSIFIER = 'head.'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint',
                        help='a file, or timm:NAME or hf:NAME to download')
    parser.add_argument('--config', required=True,
                        help='config whose model.backbone is the MoE model')
    parser.add_argument('--out', required=True,
                        help='.pth or .safetensors file to write')
    parser.add_argument('--weights',
                        help='which of the weights in the file to take, by '
                        "their name in it: 'student', 'state_dict', "
                        "'momentum_encoder' (default: those of a teacher or "
                        'averaged ones, if there are any)')
    parser.add_argument('--to-dense', nargs='?', const='core',
                        choices=['core', 'mean', 'best'],
                        help='write a file that the dense model loads: with '
                        "the cores, the experts' mean weighted by load, or "
                        'the expert that gets the most tokens')
    parser.add_argument('--change-experts',
                        choices=['tile', 'slice', 'merge', 'prune'],
                        help="change the file's number of experts to the "
                        "config's: repeat the experts, take the first ones, "
                        'merge similar ones, or drop those with the least '
                        'load')
    parser.add_argument('--fold', action='store_true',
                        help='add core and residual of each expert into one '
                        'plain expert, for inference. The file is for the '
                        'same config with moe.core=False')
    parser.add_argument('--images',
                        help='folder of pictures on which loads and '
                        'differences are measured (default: one random image)')
    parser.add_argument('--noise', type=float, default=0.,
                        help='standard deviation of random residuals, as a '
                        "fraction of that of the core's weights; their mean "
                        'over experts is zero (default 0: the model computes '
                        'exactly the dense function)')
    parser.add_argument('--cluster-routers', action='store_true',
                        help='start routers from the centres of clusters of '
                        'the tokens of --images, instead of at random')
    parser.add_argument('--rank', type=int,
                        help='rank of the residuals, instead of that in the '
                        'config')
    parser.add_argument('--layers', type=ast.literal_eval,
                        help='MoE blocks, instead of those in the config, '
                        'e.g. "((), (), (1, 3, 5), (1,))"')
    parser.add_argument('--seed', type=int, default=0,
                        help='seed of routers, noise and the test image')
    parser.add_argument('--size', type=int, default=224,
                        help='side of the test images in pixels')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of the config')
    args = parser.parse_args()
    needs_images = (args.to_dense in ('mean', 'best') or
                    args.change_experts == 'prune' or args.cluster_routers)
    if needs_images and not args.images:
        parser.error('loads and clusters of tokens are measured on pictures: '
                     'give --images FOLDER')
    ways = [flag for flag, given in (
        ('--to-dense', args.to_dense), ('--fold', args.fold),
        ('--change-experts', args.change_experts),
        ('--cluster-routers', args.cluster_routers)) if given]
    if len(ways) > 1:
        parser.error(f'{" and ".join(ways)} exclude each other')
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    config = backbone_config(cfg)
    # The time is measured from here, so that it does not include the import of
    # a host library.
    started = time.perf_counter()
    for option in ('rank', 'layers'):
        if getattr(args, option) is not None:
            config['moe'][option] = getattr(args, option)
    content = read_checkpoint(args.checkpoint)
    with weightless():
        moe, dense = build_backbone(config), build_backbone(dense_twin(config))
    images = images_for(moe, args, cfg)
    # A backbone of another library has no architecture, which says which
    # checkpoints it can load.
    dense.architecture = moe.architecture
    choice = choose_weights(content, moe.architecture, args.weights)
    if choice.line:
        print(f'{args.checkpoint}: {choice.line}')
    state, prefix, backbone = choice.state, choice.prefix, choice.backbone
    if args.to_dense:
        before, after, report = make_dense(moe, dense, backbone, images,
                                           args.to_dense)
    elif args.change_experts:
        before, after, report = change_experts(config, moe, backbone, images,
                                               args.change_experts)
    elif args.fold:
        before, after, report = make_folded(config, moe, backbone, args)
    else:
        before, after, report = make_moe(moe, dense, backbone, images, args)
    heads = (() if cfg.model.get('type', '').endswith('ImageClassifier')
             else (CLASSIFIER, ))
    rest = {}
    for key in [key for key in state if not key.startswith(prefix)]:
        if (prefix != BACKBONE or choice.pretraining or
                key.startswith(heads)):
            report.left_out[key] = 'outside the backbone'
        else:
            rest[key] = state[key]
            report.status[key] = 'copied'
    difference = largest_difference(before, after, images)
    changing = {}
    for mode in ('training', 'evaluation'):
        after.train(mode == 'training')
        changing[mode] = layers_that_change_the_function(after)
    converted = time.perf_counter()
    write_checkpoint(args.out, {
        BACKBONE + key: value for key, value in after.state_dict().items()
    } | rest, dict(rmoe_version=__version__))
    cost = measure_cost(args.out, started, converted)
    write_report(args, report, difference, changing, cost)
    print(report.table())
    print('largest difference of the features before and after, on '
          f'{len(images)} {"picture(s)" if args.images else "random image"} '
          f'of {args.size}x{args.size}: {difference["largest"]:.3g} '
          f'({100 * difference["relative"]:.3g} % of their norm)')
    for mode, layers in changing.items():
        if layers and not (args.to_dense or args.change_experts or
                           args.fold):
            print('warning: by its configuration the MoE model does not '
                  f'compute the dense function in {mode}: {layers}')
    print(f'wrote {args.out} ({cost["file_bytes"] / 1e9:.2f} GB) and '
          f'{report_path(args.out)} in {cost["seconds"]:.1f} s, '
          f'{cost["write_seconds"]:.1f} s of them writing; peak memory '
          f'{cost["peak_memory_bytes"] / 1e9:.2f} GB')
    if args.fold:
        print(how_to_load(config['moe'], before))


def images_for(model: nn.Module, args: argparse.Namespace, cfg: Config
               ) -> list[Tensor]:
    """The images of --images, or a random one with the number of channels that
    the model takes."""
    key = image_convolution(model)
    channels = model.state_dict()[key].shape[1] if key else 3
    if not args.images:
        return [torch.randn(1, channels, args.size, args.size)]
    if channels != 3:
        raise ValueError(f'--images {args.images} are read in three channels, '
                         f'but the model takes {channels}: leave out --images')
    return list(load_images(args.images, args.size, cfg))


def make_moe(moe: nn.Module, dense: nn.Module, state: dict[str, Tensor],
             images: list[Tensor], args: argparse.Namespace
             ) -> tuple[nn.Module, nn.Module, Report]:
    """Upcycle: return the dense model, the MoE model with its weights, and the
    report."""
    if count_experts(moe, state):
        raise ValueError(
            f'{args.checkpoint} is a MoE checkpoint already; --to-dense makes '
            'it dense, --change-experts gives it another number of experts')
    fitted, report = fit(moe, state)
    give_weights(moe, fitted)
    if args.noise:
        add_noise(moe, args.noise, args.seed)
    if args.cluster_routers:
        for name, share_E in cluster_routers(moe, images, args.seed).items():
            print(f'{name}: clusters with '
                  + ', '.join(f'{100 * share:.0f}' for share in share_E)
                  + ' % of the tokens')
    give_weights(dense, fit(dense, state)[0])
    return dense, moe, report


def make_dense(moe: nn.Module, dense: nn.Module, state: dict[str, Tensor],
               images: list[Tensor], how: str
               ) -> tuple[nn.Module, nn.Module, Report]:
    """Make a dense model: return the MoE model, the dense model with weights
    from it, and the report."""
    fitted, found = fit(moe, state)
    give_weights(moe, fitted)
    loads = None if how == 'core' else measure_loads(moe, images)
    result = to_dense(moe, how, loads)
    dense_state, report = fit(dense, result)
    report.include(found)
    give_weights(dense, dense_state)
    for key in fitted:
        if key not in result:
            report.left_out[key] = 'router or residual of an expert'
    return moe, dense, report


def change_experts(config: dict, moe: nn.Module, state: dict[str, Tensor],
                   images: list[Tensor], how: str
                   ) -> tuple[nn.Module, nn.Module, Report]:
    """Change the number of experts: return the MoE model with the number in the
    file, that with the number in the config, and the report."""
    count = count_experts(moe, state)
    if not count:
        raise ValueError('--change-experts needs a MoE checkpoint; this one '
                         'is dense. Without --change-experts it is upcycled')
    config = dict(config, moe=dict(config['moe'], num_experts=count))
    with weightless():
        before = build_backbone(config)
    give_weights(before, fit(before, state)[0])
    loads = measure_loads(before, images) if how == 'prune' else None
    fitted, report = fit(moe, state, how, loads)
    give_weights(moe, fitted)
    return before, moe, report


def make_folded(config: dict, moe: nn.Module, state: dict[str, Tensor],
                args: argparse.Namespace
                ) -> tuple[nn.Module, nn.Module, Report]:
    """Fold experts: return the MoE model, the one with folded experts, and the
    report."""
    if not config['moe'].get('core', True):
        raise ValueError(
            f'{args.config} has moe.core=False, so there is no core to fold; '
            f'give the config that {args.checkpoint} was trained with')
    fitted, found = fit(moe, state)
    if not count_experts(moe, state):
        raise ValueError(f'--fold needs a MoE checkpoint; {args.checkpoint} '
                         'is dense. Without --fold it becomes a MoE one')
    for key, status in found.status.items():
        if status == 'upcycled':
            raise ValueError(
                f'{key} belongs to a dense FFN in {args.checkpoint}, but to a '
                f'MoE layer in {args.config}: give the config that the '
                'checkpoint was trained with')
        if status == 'converted':
            raise ValueError(
                f'{args.checkpoint} has no {key}: it is folded already, or '
                'was trained with moe.core=False. It loads with moe.core='
                'False as it is')
    give_weights(moe, fitted)
    plain_state = to_plain(moe)
    with weightless():
        plain = build_backbone(dict(config, moe=dict(
            config['moe'], **plain_options(config['moe']))))
    plain_fitted, report = fit(plain, plain_state)
    report.include(found)
    give_weights(plain, plain_fitted)
    for key in report.status:
        if '.experts.residual_' in key:
            report.status[key] = 'converted'
    for key in fitted:
        if key not in plain_state:
            report.left_out[key] = 'part of every expert now'
    return moe, plain, report


def plain_options(moe: dict) -> dict[str, Any]:
    """The settings in ``moe`` of a config that must be changed for folded
    experts."""
    options: dict[str, Any] = dict(core=False)
    if moe.get('rank') is not None:
        options['rank'] = None
    if moe.get('unrouted') == 'core':
        options['unrouted'] = 'zero'
    return options


def how_to_load(moe: dict, model: nn.Module) -> str:
    """A text with the flags that make the config fit the folded file, and with
    a warning if they change results."""
    options = ' '.join(f'model.backbone.moe.{key}={value}'
                       for key, value in plain_options(moe).items())
    text = f'load it with --cfg-options {options}'
    if any(layer.core is not None and layer.unrouted == 'core'
           for layer in moe_layers(model).values()):
        text += ('\nwarning: padded tokens, to which the core was applied, '
                 'now get nothing. Where batches are padded (detectors, '
                 'images of several sizes) results can change a little. To '
                 'keep them, load the unfolded file and call '
                 'rmoe.upcycling.fold(model)')
    return text


def measure_cost(out: str, started: float, converted: float
                 ) -> dict[str, float]:
    """The cost of the conversion: seconds, the size of the written file, and
    the peak memory, also over that size."""
    size = os.path.getsize(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == 'darwin' else 1024)
    now = time.perf_counter()
    return dict(seconds=now - started, write_seconds=now - converted,
                file_bytes=size, peak_memory_bytes=peak,
                peak_memory_over_file=peak / size)


def report_path(out: str) -> Path:
    return Path(out).with_suffix('.report.json')


def write_report(args: argparse.Namespace, report: Report,
                 difference: dict[str, float], changing: dict[str, str],
                 cost: dict[str, float]) -> None:
    content = dict(
        checkpoint=args.checkpoint, config=args.config, source=report.source,
        to_dense=args.to_dense, change_experts=args.change_experts,
        fold=args.fold, noise=args.noise, seed=args.seed,
        largest_feature_difference=difference['largest'],
        relative_feature_difference=difference['relative'],
        preserves_function=not any(changing.values()),
        layers_that_change_the_function=changing, cost=cost,
        counts=report.counts(),
        keys=report.status, left_out=report.left_out, notes=report.notes)
    write_atomically(report_path(args.out),
                     json.dumps(content, indent=1).encode())


if __name__ == '__main__':
    run(main)
