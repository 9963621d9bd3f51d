"""Who goes where, as data. Axis letters as in routing.py."""
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Routed rows sorted by expert.

    Attributes:
        token_ids_N: (N,) int64.
        expert_ids_N: (N,) int64.
        counts_E: (E,) int64, rows of each expert.
        demand_E: (E,) int64, rows before the capacity limit.
    """
    token_ids_N: Tensor
    expert_ids_N: Tensor
    counts_E: Tensor
    demand_E: Tensor


@dataclass(frozen=True)
class StaticRows(Rows):
    """Rows of a number that depends on no decision, for tracing.

    Those that nobody serves come last, behind ``counts_E.sum()``, with any
    token and expert.

    Attributes:
        max_rows: no expert has more.
        complete: whether all rows are served, so many for each token.
    """
    max_rows: int
    complete: bool
