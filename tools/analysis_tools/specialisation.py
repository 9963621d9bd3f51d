"""Measure and draw which classes and which places each expert takes.

    python tools/analysis_tools/specialisation.py CONFIG CHECKPOINT \\
        --images 50 --out specialisation.png --json specialisation.json

Runs an mmseg segmentor over the config's test set, image by image, as in
evaluation. The class of a token is the class that covers most of its patch.
Each token counts as one, divided equally among the experts that kept it. The
tool prints, in bits, the mutual information of expert and class, of expert and
place (a cell of a 4 x 4 grid over the image), and of expert and class given
the place. "% of X" is the mutual information as a share of the entropy of the
class or the place. "chance" is the mutual information with the same expert
maps after they were shifted at random over their images, and, given the place,
with the expert maps of other images.
"""
import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _config import run
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel

from rmoe.engine.trained import build_test_data, trained_model
from rmoe.moe import moe_layers
from rmoe.moe.recording import record_routing
from rmoe.visualization.routing_maps import token_map
from rmoe.visualization.segmentor import short_name
from rmoe.visualization.specialisation import (
    Information,
    Tally,
    expert_shares,
    patch_classes,
)
from rmoe.visualization.specialisation_figure import draw_specialisation


def main() -> None:
    args = parse_args()
    if args.images < 0:
        raise ValueError(f'--images {args.images} must be positive, or 0 for '
                         'all')
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    if 'decode_head' not in cfg.model:
        raise ValueError(f'{args.config} is not the config of a segmentor: '
                         'the class of a patch is read from a segmentation '
                         'map. Give the config of a segmentor')
    model = trained_model(cfg, args.checkpoint)
    check_routers(model, args.config)
    dataset = build_test_data(cfg)
    classes = dataset.metainfo['classes']
    count = min(args.images or len(dataset), len(dataset))
    tallies = tally_experts(
        model, (labelled(dataset, i * len(dataset) // count)
                for i in range(count)), len(classes))
    measures = {name: tally.measure() for name, tally in tallies.items()}
    print(table(tallies, measures))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(
            dict(config=args.config, checkpoint=args.checkpoint,
                 images=count, classes=classes,
                 layers={name: record(tally, measures[name])
                         for name, tally in tallies.items()}), indent=1))
        print(f'wrote {args.json}')
    draw_specialisation(tallies, measures, classes, args.out,
                        f'{Path(args.config).stem}, {count} images')
    print(f'wrote {args.out}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a segmentor with experts')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--images', type=int, default=0,
                        help='number of images, evenly spaced over the test '
                        'set; 0 for all')
    parser.add_argument('--out', type=Path, default=Path('specialisation.png'))
    parser.add_argument('--json', type=Path, help='file for the numbers')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args()


def check_routers(model: BaseModel, config: str) -> None:
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f'{config} builds no MoE layer')
    soft = [name for name, layer in layers.items() if layer.router.soft]
    if soft:
        raise ValueError(
            f'{soft[0]} has a soft router: Soft MoE mixes all tokens of an '
            'image into every slot, so no expert takes a token. Measure a '
            'token-choice or expert-choice model')


def labelled(dataset: Any, index: int) -> dict:
    """An image of the data set with its segmentation map."""
    # Without this key the pipeline would raise a bare KeyError.
    item = (dataset[index] if dataset.get_data_info(index).get('seg_map_path')
            else None)
    if item is None or 'gt_sem_seg' not in item['data_samples']:
        raise ValueError(
            'the test data set has no segmentation maps: set test_dataloader'
            '.dataset.data_prefix.seg_map_path and put '
            "dict(type='LoadAnnotations') into its pipeline")
    return item


@torch.no_grad()
def tally_experts(model: BaseModel, items: Iterable[dict], num_classes: int
                  ) -> dict[str, Tally]:
    """Run the segmentor as in evaluation, and count which tokens each expert
    gets."""
    tallies = {
        short_name(name): Tally(num_classes, layer.num_experts)
        for name, layer in moe_layers(model).items()}
    with record_routing(model) as records:
        for item in items:
            image_hw = tuple(item['inputs'].shape[-2:])
            labels = item['data_samples'].gt_sem_seg.data[0]
            data = model.data_preprocessor(pseudo_collate([item]), False)
            # The whole segmentor runs, because it tells the backbone which
            # tokens are padding.
            model(**data, mode='predict')
            for (name, routings), tally in zip(records.items(),
                                               tallies.values()):
                if len(routings) != 1:
                    raise ValueError(
                        f'{name} ran {len(routings)} times for one image, so '
                        'that a patch has several tokens. Sliding windows do '
                        'this: set model.test_cfg.mode=whole')
                routing = routings.pop()
                leading, height, width, stride = token_map(
                    routing.num_tokens, tuple(data['inputs'].shape[-2:]))
                shares = expert_shares(routing)[leading:].view(
                    height, width, -1)
                # Rows and columns that are only padding are left out.
                map_hw = tuple(-(-side // stride) for side in image_hw)
                tally.add(
                    shares[:map_hw[0], :map_hw[1]],
                    patch_classes(labels, map_hw, stride, image_hw,
                                  num_classes))
    return tallies


def table(tallies: dict[str, Tally],
          measures: dict[str, dict[str, Information]]) -> str:
    first = next(iter(measures.values()))
    lines = [
        'bits that experts tell about ...',
        f'{"":<18}' + ''.join(f'{about:^26}' for about in first),
        f'{"layer":<18}'
        + f'{"bits":>8}{"chance":>8}{"% of X":>8}  ' * len(first)
        + f'{"tokens":>8}{"no expert":>11}']
    for name, tally in tallies.items():
        labelled = tally.tokens - tally.no_class
        lines.append(
            f'{name:<18}' + ''.join(
                f'{about.bits:>8.3f}{about.chance:>8.3f}'
                f'{about.share_of_target:>8.1%}  '
                for about in measures[name].values())
            + f'{labelled:>8}{tally.no_expert / max(labelled, 1):>11.1%}')
    return '\n'.join(lines)


def record(tally: Tally, measures: dict[str, Information]) -> dict:
    return dict(
        {about: asdict(value) for about, value in measures.items()},
        tokens=tally.tokens, no_class=tally.no_class,
        no_expert=tally.no_expert, counts_LE=tally.counts_LE.tolist())


if __name__ == '__main__':
    run(main)
