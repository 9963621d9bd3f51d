"""The result of a check, and helpers for its messages."""
import traceback
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Findings:
    """The mistakes that a check has found, and notes for the user.

    Attributes:
        errors: mistakes, with which training would fail or learn something
            else.
        notes: what may be intended, such as data that the libraries drop
            silently.
    """
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def extend(self, other: 'Findings') -> None:
        self.errors += other.errors
        self.notes += other.notes


def some(items: list, most: int = 8) -> str:
    """The first ``most`` items of a list, for a message."""
    more = f' and {len(items) - most} more' if len(items) > most else ''
    return ', '.join(repr(item) for item in items[:most]) + more


def explain(error: Exception) -> str:
    """A message for an exception of a library. If its text alone may not
    explain it, the message names type, file and line too."""
    if isinstance(error, (ValueError, FileNotFoundError)):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (f'{type(error).__name__}: {error} (raised in '
            f'{Path(frame.filename).name}, line {frame.lineno})')
