"""Tables as text; needs nothing but Python."""
from collections.abc import Sequence
from typing import Any


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal columns, aligned, with the names of the columns above."""
    columns = list(rows[0])
    widths = [max(len(str(row[column])) for row in [*rows, {column: column}])
              for column in columns]
    return '\n'.join(
        '  '.join(str(row[column]).ljust(width)
                  for column, width in zip(columns, widths))
        for row in [{column: column for column in columns}, *rows])
