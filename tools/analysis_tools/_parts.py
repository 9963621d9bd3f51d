"""Commands one after the other, each with a limit, whatever one does.

Needs nothing but Python: what the commands need may not be there yet.
"""
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# What a part gets to write down what it has, once its time is over.
GRACE_SECONDS = 10.


@dataclass(frozen=True)
class Part:
    """A command of a report.

    Attributes:
        name: of the part.
        command: its command line.
        seconds: its limit.
    """
    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a part went.

    Attributes:
        name: of the part.
        status: 'ok', 'failed' with its exit status, or 'stopped' at its
            limit; 'left out' where no time was left.
        seconds: that it took.
    """
    name: str
    status: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == 'ok'


def run_part(part: Part, log: Path, environment: Mapping[str, str],
             cwd: Path, seconds: float) -> Outcome:
    """Run a part to its end or its limit.

    Args:
        part: to run.
        log: file that all it says is added to.
        environment: of its process.
        cwd: its folder.
        seconds: that are left for all parts; it gets no more.
    """
    limit = min(part.seconds, seconds)
    if limit <= 0:
        return Outcome(part.name, 'left out, no time was left', 0.)
    begin = time.monotonic()
    with open(log, 'ab') as file:
        file.write(f'\n===== {part.name}: {" ".join(part.command)}\n'.encode())
        file.flush()
        status = _run(part.command, file, environment, cwd, limit)
    return Outcome(part.name, status, round(time.monotonic() - begin, 1))


def _run(command: Sequence[str], file: IO[bytes],
         environment: Mapping[str, str], cwd: Path, limit: float) -> str:
    try:
        # A session of its own: its children end with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=dict(environment), cwd=cwd, start_new_session=True,
            preexec_fn=_listen)
    except OSError as error:
        file.write(f'{error}\n'.encode())
        return f'failed, {error}'
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        _stop(process)
        return f'stopped after {limit:.0f} s'
    except BaseException:
        _stop(process)
        raise
    return 'ok' if code == 0 else f'failed, exit status {code}'


def _listen() -> None:
    """To Ctrl-C, which a shell's background jobs ignore, and their children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> None:
    """First as Ctrl-C does, so that pytest still says what it found."""
    for signal_, wait in ((signal.SIGINT, GRACE_SECONDS),
                          (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, signal_)
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            pass
        if signal_ == signal.SIGKILL:
            return
