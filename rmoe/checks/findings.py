"""What a check found, and how it is said."""
import traceback
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Findings:
    """What is wrong, and what is worth knowing.

    Attributes:
        errors: mistakes; training would fail, or learn something else.
        notes: what the libraries do without saying so.
    """
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def extend(self, other: 'Findings') -> None:
        self.errors += other.errors
        self.notes += other.notes


def some(items: list, most: int = 8) -> str:
    """The first few of a list, for a message."""
    more = f' and {len(items) - most} more' if len(items) > most else ''
    return ', '.join(repr(item) for item in items[:most]) + more


def explain(error: Exception) -> str:
    """A message for what a library raised."""
    if isinstance(error, (ValueError, FileNotFoundError)):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (f'{type(error).__name__}: {error} (raised in '
            f'{Path(frame.filename).name}, line {frame.lineno})')
