"""Measure what the experts of a trained segmentor contribute: compare its score
with those of the dense models inside it.

    python tools/analysis_tools/rescore.py CONFIG CHECKPOINT

The rows are the model as it is, its cores alone ('core') and the mean of its
experts ('mean'). The last two cost as much as a dense model. For a dense model
there is only the first row. Each is scored as configured, and with its
predictions averaged over the image and its mirror image, which gives a less
noisy score. The table is also written to rescore.json in the work dir.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

import torch
from _config import add_common_arguments, run
from _evaluation import main_score, test_runner
from mmengine.runner import Runner
from torch import Tensor

from rmoe.moe import moe_layers
from rmoe.upcycling import to_dense


def main() -> None:
    args = parse_args()
    runner = test_runner(args)
    if not hasattr(runner.model, 'inference'):
        raise ValueError(f'{type(runner.model).__name__} is no segmentor: it '
                         'gives no maps of logits to average. Give the config '
                         'of a segmentor')
    rows = rescore(runner, args.metric)
    print('\n'.join(f'{row["model"]:<8}{row["score"]:>8.2f}'
                    f'{row["flips"]:>8.2f} with flips' for row in rows))
    path = Path(runner.work_dir) / 'rescore.json'
    path.write_text(json.dumps(dict(
        config=args.config, checkpoint=args.checkpoint, rows=rows), indent=1))
    print(f'wrote {path}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a segmentor')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--metric', help='key of the evaluator; by default '
                        'mIoU')
    add_common_arguments(parser)
    return parser.parse_args()


def rescore(runner: Runner, metric: str | None) -> list[dict[str, Any]]:
    """A row for each model with its name, its score, and its score with
    mirrored images."""
    # mmengine loads the checkpoint only in runner.test(), which is not called
    # here.
    runner.load_or_resume()
    rows = [_score('as it is', runner, metric)]
    layers = moe_layers(runner.model)
    if layers and all(layer.core is not None for layer in layers.values()):
        even = {name: torch.ones(layer.num_experts)
                for name, layer in layers.items()}
        mean = to_dense(runner.model, 'mean', even)
        for layer in layers.values():
            layer.core_only = True
        rows.append(_score('core', runner, metric))
        for name, parameter in runner.model.named_parameters():
            if name in mean:
                parameter.data.copy_(mean[name])
        rows.append(_score('mean', runner, metric))
    return rows


@torch.no_grad()
def _score(name: str, runner: Runner, metric: str | None) -> dict[str, Any]:
    print(f'{name} ...', flush=True)
    model: Any = runner.model.eval()
    loader = runner.build_dataloader(runner.cfg.test_dataloader)
    plain, flips = (runner.build_evaluator(runner.cfg.test_evaluator)
                    for _ in range(2))
    for evaluator in (plain, flips):
        evaluator.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        data = model.data_preprocessor(batch, False)
        samples = data['data_samples']
        once, twice = both(model, data['inputs'],
                           [sample.metainfo for sample in samples])
        for evaluator, logits in ((plain, once), (flips, twice)):
            evaluator.process(model.postprocess_result(logits, samples), data)
    count = len(loader.dataset)
    return dict(model=name, score=main_score(plain.evaluate(count), metric),
                flips=main_score(flips.evaluate(count), metric))


def both(model: Any, images: Tensor, metas: list[dict]
         ) -> tuple[Tensor, Tensor]:
    """The logits of images, and the average of these with the logits of the
    mirror images."""
    once = model.inference(images, metas)
    mirrored = model.inference(images.flip(3), metas).flip(3)
    return once, (once + mirrored) / 2


if __name__ == '__main__':
    run(main)
