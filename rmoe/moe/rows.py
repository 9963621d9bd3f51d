"""The assignment of tokens to experts as data, and the sorts that build it.

Axis letters as in routing.py.
"""
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe import compat


@dataclass(frozen=True)
class Rows:
    """Routed rows sorted by expert: each row is one token at one expert.

    The number of rows depends on sizes and options, never on the router's
    decisions, so that tensor shapes are known without reading a tensor. Rows
    that no expert serves (padding, or tokens over the capacity) are called
    unserved. They come last, from ``ends_E[-1]`` on; their token and expert
    are arbitrary valid indices.

    Attributes:
        token_ids_N: (N,) int64, the token of each row.
        expert_ids_N: (N,) int64, the expert of each row.
        counts_E: (E,) int32, rows that each expert serves.
        ends_E: (E,) int32, where each expert's rows end.
        demand_E: (E,) int32, rows that each expert would serve without a
            capacity limit.
        num_tokens: T.
        max_rows: an upper bound of ``counts_E``, known without reading it.
        unserved_N: (N,) bool, True for unserved rows; None if all rows are
            served.
        by_token: the order and starts of :func:`order_by_token`, which find
            the rows of a token; None if each token has exactly one row.
        lonely_T: (T,) bool, True for tokens without a served row; None if
            every token has one.
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
        """True if it is known, without reading a tensor, that all experts
        have the same number of rows."""
        num_rows = len(self.token_ids_N)
        return not num_rows or (
            self.unserved_N is None and
            len(self.counts_E) * self.max_rows == num_rows)

    def kept_per_token(self) -> Tensor:
        """(T,) int64, the number of experts that kept each token."""
        if self.by_token is None:
            return torch.ones_like(self.token_ids_N)
        return kept_per_token(self.by_token[1], self.num_tokens)

    def without_unserved(self, count: int | None = None) -> 'Rows':
        """Return the served rows alone.

        Args:
            count: their number, if it is known; None reads it from
                ``ends_E``.
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
    """Find the rows of each token.

    Args:
        token_ids_N: (N,) int64, the token of each row.
        num_tokens: T.
        unserved_N: (N,) bool, True for unserved rows; None if all are served.

    Returns:
        The order, (N,) int64: the served rows of the first token, of the
        second and so on, those of one token by expert; then the unserved
        rows. And the starts, (T + 1,) int64: where each token's rows begin in
        that order, and where those of the last token end. With
        ``unserved_N`` there are N more starts, since each row then also has a
        group of its own behind the tokens: it holds the row if that is
        unserved and is empty otherwise.
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
    """(T,), the number of served rows of each token, from the starts that
    :func:`order_by_token` returns."""
    return starts[1:num_tokens + 1] - starts[:num_tokens]


def stable_sort(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Sort keys; equal keys keep their order.

    Args:
        keys_N: (N,) int64, from 0 to ``num_keys`` - 1.
        num_keys: number of possible keys.

    Returns:
        The sorted keys, and (N,) int64, the positions they came from.
    """
    if not compat.is_exporting():
        sorted_N, order_N = torch.sort(keys_N, stable=True)
        return sorted_N, order_N
    # ONNX has no stable sort. Adding the position makes every key unique.
    size = len(keys_N)
    place_N = torch.arange(size, device=keys_N.device)
    unique_N = (keys_N * size + place_N).sort().values
    return unique_N // size, unique_N % size


def starts_of(sorted_N: Tensor, num_keys: int,
              dtype: torch.dtype = torch.int32) -> Tensor:
    """(num_keys,), the position at which each key begins.

    Args:
        sorted_N: (N,) int64, sorted keys.
        num_keys: number of possible keys.
        dtype: int32 or int64, the type of the result.
    """
    if not compat.is_exporting():
        keys = torch.arange(num_keys, device=sorted_N.device)
        return torch.searchsorted(sorted_N, keys,
                                  out_int32=dtype == torch.int32)
    # ONNX has no binary search, so the keys are counted instead.
    counts = torch.zeros(num_keys, dtype=torch.int64,
                         device=sorted_N.device).scatter_add(
        0, sorted_N, torch.ones_like(sorted_N))
    return (counts.cumsum(0) - counts).to(dtype)


def by_falling(values_T: Tensor) -> Tensor:
    """(T,) int64, positions by falling value; equal values keep their
    order."""
    if not compat.is_exporting():
        return torch.sort(values_T, descending=True, stable=True).indices
    # ONNX has no stable sort. A first sort makes equal values neighbours and
    # numbers the distinct values. A second one sorts by that number and then
    # by position, so that it has no ties.
    values_T, order_T = values_T.sort(descending=True)
    step_T = (values_T[1:] != values_T[:-1]).long().cumsum(0)
    step_T = F.pad(step_T, (1, 0))
    size = len(order_T)
    return (step_T * size + order_T).sort().values % size
