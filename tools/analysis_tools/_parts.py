"""Runs commands one after the other, each with a time limit. If one fails, the
others run all the same.

This file needs nothing but Python, because the first command may be the one
that installs packages.
"""
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# The time that a part has to write its results after it was interrupted.
GRACE_SECONDS = 10.


@dataclass(frozen=True)
class Part:
    """A command of a report.

    Attributes:
        name: the name of the part.
        command: its command line.
        seconds: its time limit.
    """
    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The result of a part.

    Attributes:
        name: the name of the part.
        status: 'ok', 'failed' with its exit status, or 'stopped' at its
            limit; 'left out' if no time was left for it.
        seconds: the time it took.
    """
    name: str
    status: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == 'ok'


def run_part(part: Part, log: Path, environment: Mapping[str, str],
             cwd: Path, seconds: float) -> Outcome:
    """Run a part to its end or to its limit.

    Args:
        part: the part to run.
        log: the file to which its output is added.
        environment: the environment variables of its process.
        cwd: the folder in which it runs.
        seconds: the time that is left for all parts. The part is stopped
            after this time too.
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
        # In a session of its own, the process can be stopped together with
        # all its children.
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
    """Make the process react to an interrupt (SIGINT). Background jobs of a
    shell ignore it, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> None:
    """Stop a process and its children. They are interrupted first, as by
    Ctrl-C, so that pytest can still write its results, and killed later."""
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
