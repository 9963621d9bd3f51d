"""Build the project's own environment in ``.venv``: used by ``make``.

Runs on a bare Python 3.11 (standard library only). pip's own configuration
(mirrors, proxies, certificates) is respected because nothing here names an
index. mmcv publishes no wheel for a current PyTorch, so it is compiled once,
with its ops, and kept in a user cache keyed by torch, Python and accelerator.

    python3.11 tools/bootstrap.py        # a second run returns at once
"""
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
LOG = ROOT / '.venv' / 'bootstrap.log'
REQUIREMENTS = ROOT / 'requirements'
MMCV_VERSION = '2.1.0'
# torch 2.14's headers are C++20; mmcv's setup.py asks for C++17. The last
# -std on a command line wins.
COMPILER_WRAPPER = '#!/bin/sh\nexec {compiler} "$@" -std=c++20\n'


def main() -> None:
    if sys.version_info[:2] != (3, 11):
        fail(f'Python 3.11 is needed, this is {sys.version.split()[0]}.',
             'run: make PYTHON=/path/to/python3.11 ...')
    stamp, ready = VENV / 'rmoe-ready', fingerprint()
    if stamp.exists() and stamp.read_text() == ready:
        return
    with locked(ROOT / '.venv.lock'):
        if stamp.exists() and stamp.read_text() == ready:
            return
        started = time.time()
        if not working(PYTHON):
            shutil.rmtree(VENV, ignore_errors=True)
            step('creating .venv')
            run([sys.executable, '-m', 'venv', str(VENV)])
        step('installing build tools')
        pip('install', '-r', REQUIREMENTS / 'build.txt')
        step('installing torch (large download on the first run)')
        pip('install', '-r', REQUIREMENTS / 'torch.txt')
        pip('install', mmcv_wheel())
        step('installing mmengine, mmdet, mmsegmentation and test tools')
        pip('install', '-r', REQUIREMENTS / 'openmmlab.txt',
            '-r', REQUIREMENTS / 'dev.txt')
        step('installing rmoe (editable)')
        pip('install', '--no-build-isolation', '-e', ROOT)
        use_headless_opencv_if_needed()
        stamp.write_text(ready)
        step(f'ready in {time.time() - started:.0f} s')


def fingerprint() -> str:
    """Changes whenever what this script would install changes."""
    files = sorted(REQUIREMENTS.glob('*.txt')) + [ROOT / 'setup.py', __file__]
    digest = hashlib.sha256(str(ROOT).encode())
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def mmcv_wheel() -> Path:
    """The cached mmcv wheel for this torch and Python; built if missing."""
    key = subprocess.check_output([PYTHON, '-c', (
        'import torch, sys, platform;'
        'print(f"torch{torch.__version__}-cp{sys.version_info[0]}'
        '{sys.version_info[1]}-{platform.machine()}-"'
        '+ ("cuda" if torch.cuda.is_available() else "cpu"))')],
        text=True).strip()
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache'))
    folder = cache / 'rmoe' / 'mmcv' / key
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / 'lock'):
        found = sorted(folder.glob(f'mmcv-{MMCV_VERSION}-*.whl'))
        return found[0] if found else build_mmcv(folder)


def build_mmcv(folder: Path) -> Path:
    compiler = os.environ.get('CXX') or shutil.which('g++') or shutil.which(
        'clang++')
    if not compiler:
        fail('a C++ compiler is needed to build mmcv and none was found.',
             'install g++, e.g. on Debian or Ubuntu: '
             'apt-get install build-essential')
    # Build beside the cache entry, then rename: an interrupted build leaves
    # nothing that looks finished.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wrapper = Path(scratch) / 'c++20'
        wrapper.write_text(COMPILER_WRAPPER.format(compiler=compiler))
        wrapper.chmod(0o755)
        env = dict(os.environ, CXX=str(wrapper), MMCV_WITH_OPS='1',
                   MAX_JOBS=os.environ.get('MAX_JOBS', str(os.cpu_count())),
                   PATH=f'{VENV / "bin"}:{os.environ["PATH"]}')
        command = [PYTHON, '-m', 'pip', 'wheel', '-v', '--no-deps',
                   '--no-build-isolation', '--no-cache-dir',
                   '--no-binary', 'mmcv', f'mmcv=={MMCV_VERSION}',
                   '-w', scratch]
        step(f'building mmcv {MMCV_VERSION} with its ops: once, 9 to 15 '
             'minutes on two cores')
        run(command, env=env, progress=True)
        wheel = next(Path(scratch).glob('mmcv-*.whl'))
        return wheel.replace(folder / wheel.name)


def use_headless_opencv_if_needed() -> None:
    """opencv-python needs libGL, which a server often lacks."""
    if subprocess.run([PYTHON, '-c', 'import cv2'],
                      capture_output=True).returncode:
        version = subprocess.check_output(
            [PYTHON, '-c', 'from importlib.metadata import version as v;'
             'print(v("opencv-python"))'], text=True).strip()
        step('no libGL here: installing the headless OpenCV files')
        pip('install', '--force-reinstall', '--no-deps',
            f'opencv-python-headless=={version}')


def working(python: Path) -> bool:
    return python.exists() and subprocess.run(
        [python, '-m', 'pip', '--version'], capture_output=True
    ).returncode == 0


def pip(action: str, *args: object) -> None:
    # Every step is held to build.txt: torch alone would pull a setuptools
    # without pkg_resources.
    run([PYTHON, '-m', 'pip', '--disable-pip-version-check', action,
         '-c', REQUIREMENTS / 'build.txt', *args])


def run(command: list, env: dict | None = None,
        progress: bool = False) -> None:
    """Run quietly into the log; show one moving line; show the log's end on
    failure."""
    begin, counter, done = time.time(), [''], threading.Event()

    def show() -> None:
        tty = sys.stdout.isatty()
        while not done.wait(1 if tty else 30):
            line = f'  {counter[0]} {time.time() - begin:.0f} s elapsed'
            print(f'\r{line:<60}' if tty else line, end='' if tty else '\n',
                  flush=True)

    LOG.parent.mkdir(exist_ok=True)
    threading.Thread(target=show, daemon=True).start()
    with open(LOG, 'a') as log, subprocess.Popen(
            [str(part) for part in command], env=env, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            errors='replace') as process:
        tail: list[str] = []
        for line in process.stdout or ():
            log.write(line)
            tail = [*tail[-30:], line]
            if progress and (at := re.search(r'\[(\d+)/(\d+)\]', line)):
                counter[0] = f'compiled {at[1]} of {at[2]} files,'
    done.set()
    if sys.stdout.isatty():
        print('\r' + ' ' * 60 + '\r', end='')
    if process.returncode:
        print(''.join(tail))
        fail(f'this command failed: {" ".join(map(str, command))}',
             f'the whole output is in {LOG}')


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Two runs at once must not write the same environment or wheel."""
    with open(path, 'w') as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def step(text: str) -> None:
    print(f'[setup] {text}', flush=True)


def fail(problem: str, remedy: str) -> None:
    sys.exit(f'[setup] {problem}\n[setup] {remedy}')


if __name__ == '__main__':
    main()
