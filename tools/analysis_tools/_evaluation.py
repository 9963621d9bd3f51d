"""Loads a trained model and its test data, for tools that score the model
several times with other settings."""
import argparse

from _config import load_config
from mmengine.runner import Runner

from rmoe import safe_loading
from rmoe.checks.data import check_data

# The main scores of mmseg's and mmdet's evaluators.
METRICS = ('mIoU', 'coco/segm_mAP', 'coco/bbox_mAP', 'pascal_voc/mAP')


def test_runner(args: argparse.Namespace) -> Runner:
    """Build a runner that loads the checkpoint when it first tests.

    Args:
        args: the arguments ``config``, ``checkpoint`` and the common flags.

    Raises:
        ValueError: for several processes, or for mistakes in the test data.
    """
    if args.launcher != 'none':
        raise ValueError(f'--launcher {args.launcher}: this tool runs in one '
                         'process')
    cfg = load_config(args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    # Otherwise each evaluation would print a table of all classes.
    cfg.log_level = 'WARNING'
    check_data(cfg, ('test', ))
    safe_loading.install()
    return Runner.from_cfg(cfg)


def main_score(metrics: dict, name: str | None) -> float:
    """Choose the main score from the results of an evaluator.

    Args:
        metrics: the scores by name.
        name: the name of the score; None takes the first of ``METRICS`` that
            is there.

    Raises:
        ValueError: if the score is not among the results.
    """
    names = [name] if name else METRICS
    for each in names:
        if each in metrics:
            return float(metrics[each])
    raise ValueError(f'the evaluator gave {sorted(metrics)} and none of '
                     f'{list(names)}: name one of the scores with --metric')
