"""Make one plain file of a checkpoint that all ranks wrote into a folder.

    python tools/gather_checkpoint.py work_dirs/NAME/iter_4000 OUT.pth

The file is the one that CheckpointHook(sharded=False) would have written, with
weights, optimizer, schedulers and random states. This takes one process, no
GPU, and memory for one copy. No code in the folder is executed.
"""
import argparse
import os
import time
from pathlib import Path

from _config import run

from rmoe import compat
from rmoe.parallel.folder import IN_PARTS, find_folder, read_folder
from rmoe.upcycling import write_content


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path,
                        help='folder that CheckpointHook(sharded=True) wrote')
    parser.add_argument('out', type=Path, help='.pth file to write')
    parser.add_argument('--weights-only', action='store_true',
                        help='leave out the optimizer and, if there are '
                        'averaged weights, the other ones with which training '
                        'would continue')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    compat.require('CheckpointHook(sharded=True)')
    if args.out.suffix != '.pth':
        raise ValueError(f'{args.out} must end in .pth')
    folder = find_folder(args.folder)
    if folder is None:
        raise FileNotFoundError(f'there is no folder {args.folder}')
    started = time.perf_counter()
    content = read_folder(
        folder, lambda path, shape: None,
        ('state_dict', ) if args.weights_only else IN_PARTS, Progress())
    print(f'read {folder}; writing {args.out}', flush=True)
    write_content(args.out, content)
    print(f'wrote {args.out} ({os.path.getsize(args.out) / 1e9:.2f} GB) in '
          f'{time.perf_counter() - started:.1f} s')


class Progress:
    """Prints a line after every tenth of the bytes."""

    def __init__(self) -> None:
        self.tenths = 0

    def __call__(self, done: int, total: int) -> None:
        if 10 * done >= (self.tenths + 1) * total > 0:
            self.tenths = 10 * done // total
            print(f'{10 * self.tenths} % of {total / 1e9:.2f} GB', flush=True)


if __name__ == '__main__':
    run(main)
