"""Reads from the log of a run its stages, its environment, and the report about
the keys of the checkpoint that it loaded."""
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

RECORD = re.compile(
    r'^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d - \S+ - [A-Z]+ - (.*)$')
STAGE = re.compile(r"stage '(.*)' trains (.+) until iteration (\d+)$")
EPOCH = re.compile(r'Epoch\(train\)\s+\[\s*\d+\]\[\s*\d+/(\d+)\]')
FACT = re.compile(r'^ {4}(\S[^:]*): (.*)$')
UPCYCLING = re.compile(r'checkpoint of a .*:$')
VERSION = re.compile(r'rmoe (\d\S*)$')
# Facts about the environment that are left out; this one has pages of compiler
# flags.
LEFT_OUT = ('PyTorch compiling details', )


@dataclass(frozen=True)
class StageSpan:
    """The iterations of one stage, in which the same roles train.

    Attributes:
        name: the name of the stage.
        roles: the roles that train, as they were logged.
        begin: the first iteration of the stage.
        end: the first iteration after it.
    """
    name: str
    roles: str
    begin: int
    end: int


@dataclass
class Log:
    """The information in the logs of a run.

    Attributes:
        stages: the stages of ResidualMoEHook, in order.
        environment: versions and devices at the last start.
        upcycling: for each checkpoint that was loaded at the first start, the
            report of how its keys were used, as it was logged.
        epoch_length: number of iterations of an epoch; None if it was not
            logged.
    """
    stages: list[StageSpan] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    upcycling: list[str] = field(default_factory=list)
    epoch_length: int | None = None


def read_logs(files: Iterable[Path]) -> Log:
    """Read the logs of all starts of a run.

    A start that did not resume is a new run in the same folder, so everything
    from earlier logs is dropped.

    Args:
        files: the log of each start, the oldest first.
    """
    log = Log()
    ends: dict[int, tuple[str, str]] = {}
    for file in files:
        records = _records(file.read_text(errors='replace').splitlines())
        resumed = any(record[0].startswith('resumed epoch')
                      for record in records)
        if not resumed:
            log, ends = Log(), {}
        for first, *more in records:
            if stage := STAGE.match(first):
                ends[int(stage[3])] = stage[1], stage[2]
            elif UPCYCLING.match(first) and not resumed:
                log.upcycling.append('\n'.join([first, *more]))
            elif version := VERSION.match(first):
                log.environment['rmoe'] = version[1]
            elif epoch := EPOCH.match(first):
                log.epoch_length = int(epoch[1])
            elif any(line == 'System environment:' for line in more):
                log.environment.update(_facts(more))
    begin = 0
    for end, (name, roles) in sorted(ends.items()):
        log.stages.append(StageSpan(name, roles, begin, end))
        begin = end
    return log


def _records(lines: Iterable[str]) -> list[list[str]]:
    """Group the lines of a log: each group is a message, with the further
    lines of its text."""
    records: list[list[str]] = []
    for line in lines:
        if start := RECORD.match(line):
            records.append([start[1]])
        elif records:
            records[-1].append(line)
    return records


def _facts(lines: Iterable[str]) -> dict[str, str]:
    facts = (FACT.match(line) for line in lines)
    return {fact[1]: fact[2] for fact in facts
            if fact and fact[1] not in LEFT_OUT}
