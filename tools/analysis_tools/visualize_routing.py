"""Draw which expert each patch of an image is sent to, and the experts' loads.

    python tools/analysis_tools/visualize_routing.py CONFIG CHECKPOINT \\
        --index 3 --out routing.png

The image is one of the config's test set. Loads are counted over that image, or
over the first --load-images images of the test set.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _config import run
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate

from rmoe.engine.trained import build_test_data, trained_model
from rmoe.moe import moe_layers
from rmoe.moe.recording import record_routing
from rmoe.visualization.routing_maps import load_shares
from rmoe.visualization.segmentor import draw_segmentor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--index', type=int, default=0,
                        help='index of the image in the test set')
    parser.add_argument('--out', type=Path, default=Path('routing.png'))
    parser.add_argument('--load-images', type=int, default=0,
                        help='number of images over which loads are counted; '
                        '0 means only the image that is drawn')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()

    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    model = trained_model(cfg, args.checkpoint)
    if not moe_layers(model):
        raise ValueError(f'{args.config} builds no MoE layer')
    dataset = build_test_data(cfg)
    model.dataset_meta = dataset.metainfo
    loads = None
    if args.load_images:
        loads = count_loads(model, dataset, args.load_images)
    draw_segmentor(model, dataset[args.index], args.out, loads,
                   title=f'{Path(args.config).stem}')
    print(f'wrote {args.out}')


@torch.no_grad()
def count_loads(model, dataset, num_images: int) -> dict:
    with record_routing(model) as records:
        for index in range(min(num_images, len(dataset))):
            data = model.data_preprocessor(pseudo_collate([dataset[index]]),
                                           False)
            model.extract_feat(data['inputs'])
        return {name: load_shares(routings)
                for name, routings in records.items() if routings}


if __name__ == '__main__':
    run(main)
