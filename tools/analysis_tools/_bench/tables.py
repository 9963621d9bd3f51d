"""Formats tables as text. It needs nothing but Python, so that gpu_report.py
can use it before packages are installed."""
from collections.abc import Sequence
from typing import Any


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows with the same columns as aligned text, below the names of the
    columns."""
    columns = list(rows[0])
    widths = [max(len(str(row[column])) for row in [*rows, {column: column}])
              for column in columns]
    return '\n'.join(
        '  '.join(str(row[column]).ljust(width)
                  for column, width in zip(columns, widths))
        for row in [{column: column for column in columns}, *rows])
