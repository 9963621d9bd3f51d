"""Write a report of runs: one HTML file that needs no network.

    python tools/report.py work_dirs/moe
    python tools/report.py work_dirs/moe work_dirs/dense --out compared.html

Score and losses, seconds and memory, the load of every expert over time,
experts on validation images, classes by expert, costs, config and versions.
Several runs (dense against MoE, seeds) stand side by side; costs are compared
with the first dense one. What the work dirs no longer have, or what their
configs name and is gone, is said in the report.
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
                        help='of the validation set, drawn with the expert of '
                        'each patch; 0 needs neither model nor data')
    parser.add_argument('--count-images', type=int, default=32,
                        help='of the validation set, over which it is '
                        'counted which classes each expert takes')
    args = parser.parse_args()
    if missing := missing_packages():
        raise ValueError(missing)
    # Of the libraries that build the model, about themselves.
    warnings.filterwarnings('ignore', category=UserWarning)
    print(f'wrote {write_report(**vars(args))}')


if __name__ == '__main__':
    run(main)
