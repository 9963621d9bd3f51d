"""A report on every key of a checkpoint and of the model that loads it."""
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """Says for every key of a checkpoint and of a model what became of it.

    Attributes:
        source: name of the source whose names the file uses.
        status: for each key of the model: 'loaded', 'upcycled' (a dense FFN
            that is now a core), 'resized', 'adapted' (to another number of
            image channels), 'new' (not in the file) or 'converted' (another
            expert count, or with and without a core).
        left_out: the reason for each key of the file that was not used.
        notes: a sentence on what was done for those keys of the model whose
            status does not say enough.
    """
    source: str
    status: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return {**Counter(self.status.values()), 'left out': len(
            self.left_out)}

    def include(self, earlier: 'Report') -> None:
        """Take over the notes of an earlier step on the way from the file to
        the model."""
        self.notes.update(earlier.notes)
        self.status.update({key: earlier.status[key]
                            for key in earlier.notes})

    def table(self) -> str:
        """A text with a line for each status, which has the number of its keys
        and the first of them, and then a line for each note."""
        groups: dict[str, list[str]] = {}
        for key, status in self.status.items():
            groups.setdefault(status, []).append(key)
        for key, reason in self.left_out.items():
            groups.setdefault('left out', []).append(f'{key} ({reason})')
        lines = [f'checkpoint of a {self.source}:']
        for status, keys in groups.items():
            some = ', '.join(keys[:3]) + (', ...' if len(keys) > 3 else '')
            lines.append(f'  {status:<10}{len(keys):>5}  {some}')
        lines += [f'  {key}: {note}' for key, note in self.notes.items()]
        return '\n'.join(lines)
