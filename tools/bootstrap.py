"""Build the virtual environments of the project. ``make`` calls this script.

It runs on Python 3.10 to 3.13 with the standard library only, and compiles
nothing, except for ``full``. pip's own configuration (mirrors, proxies,
certificates) applies, because nothing here names an index.

    python3 tools/bootstrap.py           # .venv: what make demo needs
    python3 tools/bootstrap.py test      # .venv: also what make test needs
    python3 tools/bootstrap.py oldest    # .venv-oldest: the oldest libraries
    python3 tools/bootstrap.py fork      # .venv-fork: the maintained fork
    python3 tools/bootstrap.py docs      # .venv-docs: what make docs needs
    python3 tools/bootstrap.py full      # .venv, and compiled mmcv beside it

A second run returns at once. ``full`` builds mmcv with its own operators once,
which needs a C++ compiler and takes 10 to 26 minutes, and keeps the result in
the user's cache.
"""
import argparse
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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / 'requirements'
MMCV_VERSION = '2.1.0'
# The headers of torch 2.14 need C++20, but mmcv's setup.py asks for C++17. This
# wrapper adds another -std, and compilers take the last one.
COMPILER_WRAPPER = '#!/bin/sh\nexec {compiler} "$@" -std=c++20\n'
# The folder in .venv with the compiled mmcv. If it comes first on PYTHONPATH,
# it is imported instead of mmcv-lite.
FULL_MMCV = 'mmcv-full'


@dataclass(frozen=True)
class Environment:
    """The description of a virtual environment.

    Attributes:
        folder: its folder.
        steps: the installations in order. Each is a group of files of
            requirements/ that are installed together.
        pythons: the commands of Python that may make it, the best first. Empty
            for the Python that runs this script.
        constraints: the file of requirements/ with pip's constraints for every
            step.
        has_rmoe: whether rmoe is installed too.
    """
    folder: str
    steps: tuple[tuple[str, ...], ...]
    pythons: tuple[str, ...] = ()
    constraints: str = 'build.txt'
    has_rmoe: bool = True


NEWEST = ('torch.txt',), ('mmcv.txt', 'openmmlab.txt', 'run.txt',
                           'report.txt')
ENVIRONMENTS = {
    'run': Environment('.venv', NEWEST),
    'test': Environment('.venv', (*NEWEST, ('test.txt', 'dev.txt'))),
    'oldest': Environment(
        '.venv-oldest', (('torch-oldest.txt',),
                         ('mmcv.txt', 'openmmlab.txt', 'run.txt',
                          'report.txt', 'test.txt')),
        ('python3.10', 'python3.11'), 'oldest.txt'),
    'fork': Environment(
        '.venv-fork', (('torch.txt',),
                       ('fork.txt', 'run.txt', 'report.txt', 'test.txt'))),
    # The site is made from the source of rmoe without importing it.
    'docs': Environment('.venv-docs', (('docs.txt',),), has_rmoe=False),
}


class Setup:
    """Makes one virtual environment."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.venv = ROOT / environment.folder
        self.python = self.venv / 'bin' / 'python'
        self.log = self.venv / 'bootstrap.log'

    def run(self) -> None:
        if self.is_ready():
            return
        with locked(ROOT / f'{self.environment.folder}.lock'):
            if not self.is_ready():
                self.make()

    def is_ready(self) -> bool:
        """Whether the environment was made, or a larger one in the same
        folder."""
        ready = {fingerprint(other) for other in ENVIRONMENTS.values()
                 if other.folder == self.environment.folder and
                 set(other.steps) >= set(self.environment.steps)}
        stamp = self.venv / 'rmoe-ready'
        return stamp.exists() and stamp.read_text() in ready

    def make(self) -> None:
        started = time.time()
        if not working(self.python):
            shutil.rmtree(self.venv, ignore_errors=True)
            maker = self.maker()
            say(f'creating {self.environment.folder}')
            self.command([maker, '-m', 'venv', self.venv])
        self.pip('build tools', '-r', REQUIREMENTS / 'build.txt')
        for files in self.environment.steps:
            what = ', '.join(name.removesuffix('.txt') for name in files)
            self.pip(what, *(part for name in files
                             for part in ('-r', REQUIREMENTS / name)))
        if self.environment.has_rmoe:
            self.pip('rmoe (editable)', '--no-build-isolation', '-e', ROOT)
            self.use_headless_opencv_if_needed()
        (self.venv / 'rmoe-ready').write_text(fingerprint(self.environment))
        say(f'{self.environment.folder} is ready, after '
            f'{time.time() - started:.0f} s')

    def maker(self) -> str:
        """The Python that makes the environment: the one that runs this script,
        unless the environment asks for others."""
        if not self.environment.pythons:
            return sys.executable
        for name in self.environment.pythons:
            # A version manager may install a command that does not run.
            if shutil.which(name) and subprocess.run(
                    [name, '-c', ''], capture_output=True).returncode == 0:
                return name
        raise fail(f'{self.environment.folder} needs one of '
                   f'{", ".join(self.environment.pythons)}, but none runs.',
                   'install one of them and run this again')

    def pip(self, what: str, *args: object) -> None:
        began = time.time()
        # The constraints apply to every step. Without them, the step that
        # installs torch would also install a setuptools without pkg_resources.
        self.command(
            [self.python, '-m', 'pip', '--disable-pip-version-check',
             'install', '-c', REQUIREMENTS / self.environment.constraints,
             *args], f'installing {what}:')
        say(f'installed {what} in {time.time() - began:.0f} s')

    def use_headless_opencv_if_needed(self) -> None:
        """Install the headless OpenCV if opencv-python cannot be imported. It
        needs libGL, which servers often do not have."""
        if subprocess.run([self.python, '-c', 'import cv2'],
                          capture_output=True).returncode:
            version = subprocess.check_output(
                [self.python, '-c', 'from importlib.metadata import version '
                 'as v;print(v("opencv-python"))'], text=True).strip()
            self.pip('headless OpenCV files, because there is no libGL',
                     '--force-reinstall', '--no-deps',
                     f'opencv-python-headless=={version}')

    def compile_mmcv(self) -> None:
        """Install mmcv with its operators into a folder of the environment."""
        target = self.venv / FULL_MMCV
        if target.exists():
            return
        with locked(ROOT / f'{self.environment.folder}.lock'):
            wheel = self.mmcv_wheel()
            scratch = target.with_name(f'{FULL_MMCV}.new')
            self.pip('compiled mmcv', '--no-deps', '--upgrade', '--target',
                     scratch, wheel)
            scratch.replace(target)

    def mmcv_wheel(self) -> Path:
        """The wheel for this torch and Python from the cache. It is built if it
        is not there."""
        key = subprocess.check_output([self.python, '-c', (
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
            return found[0] if found else self.build_mmcv(folder)

    def build_mmcv(self, folder: Path) -> Path:
        compiler = os.environ.get('CXX') or shutil.which(
            'g++') or shutil.which('clang++')
        if not compiler:
            raise fail('MMCV=full needs a C++ compiler and none was found.',
                       'leave MMCV=full out, or install g++, e.g. on Debian '
                       'or Ubuntu: apt-get install build-essential')
        self.pip('what mmcv builds with', 'ninja', 'psutil')
        # The wheel is built in a temporary folder and then moved, so that an
        # interrupted build leaves no wheel that looks finished.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wrapper = Path(scratch) / 'c++20'
            wrapper.write_text(COMPILER_WRAPPER.format(compiler=compiler))
            wrapper.chmod(0o755)
            env = dict(
                os.environ, CXX=str(wrapper), MMCV_WITH_OPS='1',
                MAX_JOBS=os.environ.get('MAX_JOBS', str(os.cpu_count())),
                PATH=f'{self.venv / "bin"}:{os.environ["PATH"]}')
            say(f'building mmcv {MMCV_VERSION} with its operators: once, 10 '
                'to 26 minutes on two cores')
            self.command(
                [self.python, '-m', 'pip', 'wheel', '-v', '--no-deps',
                 '--no-build-isolation', '--no-cache-dir', '--no-binary',
                 'mmcv', f'mmcv=={MMCV_VERSION}', '-w', scratch],
                'building mmcv:', env)
            wheel = next(Path(scratch).glob('mmcv-*.whl'))
            return wheel.replace(folder / wheel.name)

    def command(self, command: list, label: str = '',
                env: dict | None = None) -> None:
        """Run a command with its output in the log. A line shows its progress,
        and if it fails, the end of its output is shown."""
        begin, doing, done = time.time(), [''], threading.Event()

        def show() -> None:
            tty = sys.stdout.isatty()
            while not done.wait(1 if tty else 30):
                line = f'  {label} {doing[0]} {time.time() - begin:.0f} s'
                print(f'\r{line:<79}' if tty else line,
                      end='' if tty else '\n', flush=True)

        self.log.parent.mkdir(exist_ok=True)
        threading.Thread(target=show, daemon=True).start()
        with open(self.log, 'a') as log, subprocess.Popen(
                [str(part) for part in command], env=env, cwd=ROOT,
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                errors='replace') as process:
            tail: list[str] = []
            for line in process.stdout or ():
                log.write(line)
                tail = [*tail[-30:], line]
                doing[0] = progress(line) or doing[0]
        done.set()
        if sys.stdout.isatty():
            print('\r' + ' ' * 79 + '\r', end='')
        if process.returncode:
            print(''.join(tail))
            raise fail(
                f'this command failed: {" ".join(map(str, command))}',
                'check that the package registry can be reached (pip uses its '
                'own configuration of index, proxy and certificates)\n[setup] '
                f'nothing has to be cleaned up: the same command continues '
                f'where this one stopped. The whole output is in {self.log}')


def progress(line: str) -> str:
    """The progress that a line of output of pip or of a build reports; empty if
    it reports none."""
    if at := re.search(r'\[(\d+)/(\d+)\]', line):
        return f'compiled {at[1]} of {at[2]} files,'
    if at := re.search(r'Downloading (\S+?)-\d\S* \((.+?)\)', line):
        return f'downloading {at[1]} ({at[2]}),'
    if 'Installing collected packages' in line:
        return 'unpacking,'
    return ''


def fingerprint(environment: Environment) -> str:
    """A hash that changes whenever this script would install something
    else."""
    files = [ROOT / 'setup.py', Path(__file__), *(
        REQUIREMENTS / name for name in (
            'build.txt', environment.constraints,
            *(name for step in environment.steps for name in step)))]
    digest = hashlib.sha256(f'{ROOT}{environment}'.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def working(python: Path) -> bool:
    return python.exists() and subprocess.run(
        [python, '-m', 'pip', '--version'], capture_output=True
    ).returncode == 0


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context with a lock on a file, so that two runs at the same time do not
    write the same environment or wheel."""
    with open(path, 'w') as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    print(f'[setup] {text}', flush=True)


def fail(problem: str, remedy: str) -> SystemExit:
    return SystemExit(f'[setup] {problem}\n[setup] {remedy}')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='?', default='run',
                        choices=[*ENVIRONMENTS, 'full'])
    what = parser.parse_args().what
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise fail(f'Python 3.10 to 3.13 is needed, this is '
                   f'{sys.version.split()[0]}.',
                   'run: make PYTHON=/path/to/python3.11 ...')
    setup = Setup(ENVIRONMENTS['test' if what == 'full' else what])
    setup.run()
    if what == 'full':
        setup.compile_mmcv()


if __name__ == '__main__':
    main()
