"""Check a config before a long training, and measure what the training takes.

    python tools/analysis_tools/check_config.py CONFIG
    python tools/analysis_tools/check_config.py CONFIG --all --iters 50

Checks the data of every split, the model's classes and channels, its MoE
layers and hooks, and the checkpoint it starts from, and then trains a few
iterations of every stage. Every problem is printed with its fix, and the exit
code is 1 if there is one. Nothing is written or downloaded.
"""
import argparse
import sys
import warnings
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

from _config import run
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope

from rmoe import safe_loading
from rmoe.checks.data import MAX_IMAGES
from rmoe.checks.examination import MAX_LABEL_MAPS, Report, examine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--all', action='store_true',
                        help='read every image and label map, instead of '
                        f'{MAX_IMAGES} and {MAX_LABEL_MAPS} of each split')
    parser.add_argument('--iters', type=int, default=5,
                        help='number of iterations of each stage that are '
                        'timed. If worker processes load the data, it should '
                        'be larger than the number of batches that they load '
                        'in advance')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='override settings of the config')
    args = parser.parse_args()
    if args.iters < 1:
        parser.error(f'--iters {args.iters} must be at least 1')
    warnings.filterwarnings('ignore')
    safe_loading.install()
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    report = Report()
    examine(cfg, report, args.all, args.iters)
    if report.problems:
        count = len(report.problems)
        report.say(f'\n{count} problem{"s" * (count > 1)}')
        for problem in report.problems:
            report.say(f'! {problem}')
        sys.exit(1)
    report.say('\nNothing is wrong.')


if __name__ == '__main__':
    run(main)
