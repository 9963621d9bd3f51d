"""Who goes where, as data. Axis letters as in routing.py."""
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe import compat


@dataclass(frozen=True)
class Rows:
    """Routed rows sorted by expert: each is one token at one expert.

    How many rows there are depends on sizes and options, never on decisions.
    Rows that nobody serves (padding, or tokens over the capacity) come last,
    behind ``ends_E[-1]``, with any token and expert.

    Attributes:
        token_ids_N: (N,) int64.
        expert_ids_N: (N,) int64.
        counts_E: (E,) int32, rows that each expert serves.
        ends_E: (E,) int32, where each expert's rows end.
        demand_E: (E,) int32, rows before the capacity limit.
        num_tokens: T.
        max_rows: no expert has more.
        unserved_N: (N,) bool, True for the rows that nobody serves; None
            means that all are served.
        by_token: how to find the rows of a token, see
            :func:`order_by_token`; None where each token has one row.
        lonely_T: (T,) bool, tokens without a row; None where each has some.
    """
    token_ids_N: Tensor
    expert_ids_N: Tensor
    counts_E: Tensor
    ends_E: Tensor
    demand_E: Tensor
    num_tokens: int
    max_rows: int
    unserved_N: Tensor | None = None
    by_token: tuple[Tensor, Tensor] | None = None
    lonely_T: Tensor | None = None

    @property
    def even(self) -> bool:
        """Do all experts have the same number of rows, known without
        looking?"""
        num_rows = len(self.token_ids_N)
        return not num_rows or (
            self.unserved_N is None and
            len(self.counts_E) * self.max_rows == num_rows)

    def kept_per_token(self) -> Tensor:
        """(T,) int64, how many experts kept each token."""
        if self.by_token is None:
            return torch.ones_like(self.token_ids_N)
        return kept_per_token(self.by_token[1], self.num_tokens)

    def without_unserved(self, count: int | None = None) -> 'Rows':
        """The rows that somebody serves.

        Args:
            count: how many these are, if it is known; None reads it.
        """
        if self.unserved_N is None:
            return self
        assert self.by_token is not None
        if count is None:
            count = int(self.ends_E[-1])
        order_N, starts = self.by_token
        return replace(
            self, token_ids_N=self.token_ids_N[:count],
            expert_ids_N=self.expert_ids_N[:count], unserved_N=None,
            by_token=(order_N[:count], starts[:self.num_tokens + 1]))


def order_by_token(token_ids_N: Tensor, num_tokens: int,
                   unserved_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the rows of each token are.

    Returns:
        (N,) int64, the served rows token after token, in the order of their
        experts, then the others; and (T + 1,) int64, where each token's rows
        begin in that order, and where the last one's end. Where rows are not
        served there are N more: of each such row, as if it were a token of
        its own, and of as many that are empty.
    """
    num_bags = num_tokens
    if unserved_N is not None:
        junk_N = torch.arange(num_tokens, num_tokens + len(token_ids_N),
                              device=token_ids_N.device)
        token_ids_N = torch.where(unserved_N, junk_N, token_ids_N)
        num_bags += len(token_ids_N)
    sorted_N, order_N = stable_sort(token_ids_N, num_bags)
    return order_N, starts_of(sorted_N, num_bags + 1, torch.int64)


def kept_per_token(starts: Tensor, num_tokens: int) -> Tensor:
    """(T,) how many rows each token has, from where they start."""
    return starts[1:num_tokens + 1] - starts[:num_tokens]


def stable_sort(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Sorted keys and their order, equal keys by position.

    Args:
        keys_N: (N,) int64, from 0 to ``num_keys`` - 1.
        num_keys: how many there are.
    """
    if not compat.is_exporting():
        sorted_N, order_N = torch.sort(keys_N, stable=True)
        return sorted_N, order_N
    # ONNX has no stable sort: positions make the keys different.
    size = len(keys_N)
    place_N = torch.arange(size, device=keys_N.device)
    unique_N = (keys_N * size + place_N).sort().values
    return unique_N // size, unique_N % size


def starts_of(sorted_N: Tensor, num_keys: int,
              dtype: torch.dtype = torch.int32) -> Tensor:
    """(num_keys,) where each key begins among sorted ones.

    Args:
        sorted_N: (N,) int64.
        num_keys: how many keys.
        dtype: int32 or int64.
    """
    if not compat.is_exporting():
        keys = torch.arange(num_keys, device=sorted_N.device)
        return torch.searchsorted(sorted_N, keys,
                                  out_int32=dtype == torch.int32)
    # ONNX has no binary search.
    counts = torch.zeros(num_keys, dtype=torch.int64,
                         device=sorted_N.device).scatter_add(
        0, sorted_N, torch.ones_like(sorted_N))
    return (counts.cumsum(0) - counts).to(dtype)


def by_falling(values_T: Tensor) -> Tensor:
    """(T,) int64, positions by falling value, equal ones by position."""
    if not compat.is_exporting():
        return torch.sort(values_T, descending=True, stable=True).indices
    # ONNX has no stable sort: equal values, neighbours after a first sort,
    # get one number, and a second sort has no ties.
    values_T, order_T = values_T.sort(descending=True)
    step_T = (values_T[1:] != values_T[:-1]).long().cumsum(0)
    step_T = F.pad(step_T, (1, 0))
    size = len(order_T)
    return (step_T * size + order_T).sort().values % size
