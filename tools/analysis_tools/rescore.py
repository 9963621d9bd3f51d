"""What do the experts of a trained segmentor give? Its score as it is, and
that of the dense models inside it.

    python tools/analysis_tools/rescore.py CONFIG CHECKPOINT

Rows are the model as it is, its cores alone ('core') and the mean of its
experts ('mean'), which cost what a dense model costs; a dense model has the
first alone. Each is scored as configured and with its predictions averaged
over the image and its mirror image, which are less noisy. rescore.json in the
work dir has the table.
"""
import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

import torch
from _config import add_common_arguments, load_config, run
from capacity_sweep import main_score
from mmengine.runner import Runner
from torch import Tensor, nn

from rmoe import safe_loading
from rmoe.engine.data_check import check_data
from rmoe.moe import moe_layers
from rmoe.upcycling import to_dense


def main() -> None:
    args = parse_args()
    if args.launcher != 'none':
        raise ValueError(f'--launcher {args.launcher}: models are scored in '
                         'one process')
    cfg = load_config(args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    cfg.log_level = 'WARNING'  # a table of classes per evaluation is noise
    check_data(cfg, ('test', ))
    safe_loading.install()
    runner = Runner.from_cfg(cfg)
    if not hasattr(runner.model, 'inference'):
        raise ValueError(f'{type(runner.model).__name__} is no segmentor: it '
                         'gives no maps of logits to average')
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
    """A row for each model: its name, its score, and that with flips."""
    # mmengine loads the checkpoint when it first tests.
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


def _score(name: str, runner: Runner, metric: str | None) -> dict[str, Any]:
    print(f'{name} ...', flush=True)
    score = main_score(runner.test(), metric)
    with flipped(runner.model):
        return dict(model=name, score=score,
                    flips=main_score(runner.test(), metric))


@contextmanager
def flipped(model: nn.Module) -> Iterator[None]:
    """While it is open, a segmentor averages the logits of an image with
    those of its mirror image."""
    inference: Any = model.inference

    def both(inputs: Tensor, metas: list[dict]) -> Tensor:
        return (inference(inputs, metas)
                + inference(inputs.flip(3), metas).flip(3)) / 2

    model.inference = both  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.inference


if __name__ == '__main__':
    run(main)
