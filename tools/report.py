"""Write a report of training runs: one HTML file that needs no network.

    python tools/report.py work_dirs/moe
    python tools/report.py work_dirs/moe work_dirs/dense --out compared.html

The report shows scores and losses, seconds and memory, the load of every expert
over time, experts on validation images, classes by expert, costs, config and
versions. Several runs (dense and MoE, or seeds) are shown side by side, and
costs are compared with those of the first dense one. If files of a work dir, or
data that its config needs, are missing, the report says so.
"""
import argparse
import warnings
from pathlib import Path

from _config import run

from rmoe.report import DEFAULT_NAME, missing_packages, write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work_dirs', nargs='+', type=Path, metavar='WORK_DIR')
    parser.add_argument('--out', type=Path,
                        help=f'the file; default: {DEFAULT_NAME} in the first '
                        'work dir')
    parser.add_argument('--images', type=int, default=4,
                        help='number of images of the validation set that are '
                        'drawn with the expert of each patch; 0 needs neither '
                        'model nor data')
    parser.add_argument('--count-images', type=int, default=32,
                        help='number of images of the validation set from '
                        'which is counted which classes each expert takes')
    args = parser.parse_args()
    if missing := missing_packages():
        raise ValueError(missing)
    # The libraries that build the model warn about things that do not concern
    # the user of the report.
    warnings.filterwarnings('ignore', category=UserWarning)
    print(f'wrote {write_report(**vars(args))}')


if __name__ == '__main__':
    run(main)
