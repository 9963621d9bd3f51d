"""Put the stand-in for mmcv's operators beside mmcv, or take it away.

This is for programs that import mmseg or mmdet before rmoe, such as those
libraries' own tools/train.py. Programs that import rmoe first do not need it.

    python -m rmoe.mmcv_ops add       # writes one line: mmcv/_ext.py
    python -m rmoe.mmcv_ops remove    # deletes that file
    python -m rmoe.mmcv_ops status    # says which operators mmcv has
"""
import argparse
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

LINE = ('from rmoe.mmcv_ops.extension import *  '
        '# by rmoe; python -m rmoe.mmcv_ops remove\n')


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m rmoe.mmcv_ops', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('action', choices=['add', 'remove', 'status'])
    action = parser.parse_args().action
    try:
        folder = mmcv_folder()
        print({'add': add, 'remove': remove, 'status': status}[action](folder))
    except ValueError as error:
        sys.exit(f'error: {error}')


def mmcv_folder() -> Path:
    """The folder in which mmcv is installed.

    Raises:
        ValueError: if mmcv is not installed.
    """
    spec = find_spec('mmcv')
    # An empty folder that uninstalling mmcv left behind has no origin.
    if spec is None or spec.origin is None:
        raise ValueError(
            f'{sys.executable} has no mmcv: python -m pip install mmcv-lite')
    return Path(spec.origin).parent


def add(folder: Path) -> str:
    """Write the file, and return a sentence that says what was done.

    Raises:
        ValueError: if mmcv has operators, if the file of another library is
            in this place, or if the folder cannot be written.
    """
    if compiled := compiled_extension(folder):
        raise ValueError(f'mmcv has its own operators ({compiled}): nothing '
                         'needs to stand in for them')
    path = folder / '_ext.py'
    if path.exists():
        _check_ours(path)
        return f'{path} is there already'
    scratch = folder / f'_ext.py.{os.getpid()}'
    try:
        scratch.write_text(LINE)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ValueError(
            f'{folder} cannot be written ({error.strerror}). Import rmoe '
            'before mmseg or mmdet instead, as tools/train.py of rmoe does, '
            'or make a virtual environment of your own') from error
    return f'wrote {path}: mmseg and mmdet now find operators in it'


def remove(folder: Path) -> str:
    """Delete the file, and return a sentence that says what was done.

    Raises:
        ValueError: if the file is that of another library, or cannot be
            deleted.
    """
    path = folder / '_ext.py'
    if not path.exists():
        return f'{path} is not there: nothing to remove'
    _check_ours(path)
    try:
        path.unlink()
    except OSError as error:
        raise ValueError(f'{path} cannot be removed ({error.strerror})'
                         ) from error
    for cached in (folder / '__pycache__').glob('_ext.*.pyc'):
        cached.unlink(missing_ok=True)
    return f'removed {path}'


def status(folder: Path) -> str:
    """A sentence that says which operators mmcv has."""
    if compiled := compiled_extension(folder):
        return f'mmcv has its own operators: {compiled}'
    path = folder / '_ext.py'
    if not path.exists():
        return ('mmcv has no operators; programs that import rmoe first get '
                "rmoe's")
    _check_ours(path)
    return f"mmcv has no operators; {path} leads every program to rmoe's"


def compiled_extension(folder: Path) -> Path | None:
    """The file with mmcv's compiled operators; None if there is none."""
    return next((folder / f'_ext{suffix}' for suffix in EXTENSION_SUFFIXES
                 if (folder / f'_ext{suffix}').exists()), None)


def _check_ours(path: Path) -> None:
    if 'rmoe.mmcv_ops' not in path.read_text(errors='replace'):
        raise ValueError(f'{path} was not written by rmoe: another library '
                         "stands in for mmcv's operators. Delete the file if "
                         'it is not needed, and run this again')


if __name__ == '__main__':
    main()
