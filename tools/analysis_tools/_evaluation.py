"""A trained model and its test data, for tools that score it several times."""
import argparse

from _config import load_config
from mmengine.runner import Runner

from rmoe import safe_loading
from rmoe.checks.data import check_data

# Main scores of mmseg's and mmdet's evaluators.
METRICS = ('mIoU', 'coco/segm_mAP', 'coco/bbox_mAP', 'pascal_voc/mAP')


def test_runner(args: argparse.Namespace) -> Runner:
    """A runner of a config that loads a checkpoint when it first tests.

    Args:
        args: ``config``, ``checkpoint`` and the common flags.

    Raises:
        ValueError: for several processes, or test data that is wrong.
    """
    if args.launcher != 'none':
        raise ValueError(f'--launcher {args.launcher}: this tool runs in one '
                         'process')
    cfg = load_config(args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    cfg.log_level = 'WARNING'  # a table of classes per evaluation is noise
    check_data(cfg, ('test', ))
    safe_loading.install()
    return Runner.from_cfg(cfg)


def main_score(metrics: dict, name: str | None) -> float:
    """Of what an evaluator gave.

    Args:
        metrics: by name.
        name: of the score; None takes the first of ``METRICS``.

    Raises:
        ValueError: if it is not among them.
    """
    names = [name] if name else METRICS
    for each in names:
        if each in metrics:
            return float(metrics[each])
    raise ValueError(f'the evaluator gave {sorted(metrics)} and none of '
                     f'{list(names)}: name one with --metric')
