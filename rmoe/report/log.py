"""What a run said in its log: stages, environment, fate of a checkpoint."""
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
# Pages of compiler flags.
LEFT_OUT = ('PyTorch compiling details', )


@dataclass(frozen=True)
class StageSpan:
    """Iterations in which the same roles train.

    Attributes:
        name: of the stage.
        roles: that train, as logged.
        begin: its first iteration.
        end: the first one after it.
    """
    name: str
    roles: str
    begin: int
    end: int


@dataclass
class Log:
    """What the logs of a run say.

    Attributes:
        stages: of ResidualMoEHook, in order.
        environment: versions and devices, of the last start.
        upcycling: for each checkpoint that was loaded at the first start,
            what became of its keys, as logged.
        epoch_length: iterations of an epoch; None where nothing says.
    """
    stages: list[StageSpan] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    upcycling: list[str] = field(default_factory=list)
    epoch_length: int | None = None


def read_logs(files: Iterable[Path]) -> Log:
    """The logs of all starts of a run.

    What a start says that resumed nothing takes the place of all before.

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
    """What was logged at a time: the message, and the lines below it."""
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
