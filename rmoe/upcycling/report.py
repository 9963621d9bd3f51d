"""What became of every key of a checkpoint and of a model."""
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """What became of every key.

    Attributes:
        source: who named the file's weights.
        status: for each key of the model: 'loaded', 'upcycled' (a dense FFN
            that is now a core), 'resized', 'new' (not in the file) or
            'converted' (another expert count, or with and without a core).
        left_out: for each key of the file that was not used, why.
    """
    source: str
    status: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return {**Counter(self.status.values()), 'left out': len(
            self.left_out)}

    def table(self) -> str:
        """One line per outcome: how many keys, and the first few."""
        groups: dict[str, list[str]] = {}
        for key, status in self.status.items():
            groups.setdefault(status, []).append(key)
        for key, reason in self.left_out.items():
            groups.setdefault('left out', []).append(f'{key} ({reason})')
        lines = [f'checkpoint of a {self.source}:']
        for status, keys in groups.items():
            some = ', '.join(keys[:3]) + (', ...' if len(keys) > 3 else '')
            lines.append(f'  {status:<10}{len(keys):>5}  {some}')
        return '\n'.join(lines)
