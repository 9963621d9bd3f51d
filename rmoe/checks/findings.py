"""What a check of the data found."""
from dataclasses import dataclass, field


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
