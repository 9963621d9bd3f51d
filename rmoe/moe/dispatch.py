"""Dispatch and combine: copy tokens to rows, and sum rows back into tokens.

A row is one token at one expert, see :class:`rmoe.moe.rows.Rows`. There are
no parameters here. Forward and backward only gather, they never scatter-add,
so results are the same on every run. The contents of unserved rows (padding,
or tokens over the capacity) never reach a result. Axis letters as in
routing.py.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmoe import compat
from rmoe.moe.host import host_may_read
from rmoe.moe.rows import Rows, kept_per_token

# Devices on which PyTorch's embedding_bag sums groups of rows ("bags") in one
# kernel. On other devices, and in ONNX, rows are summed by index_add.
BAGS = ('cpu', 'cuda')


def tokens_to_rows(x_TD: Tensor, rows: Rows) -> Tensor:
    """Copy tokens to their rows (dispatch).

    Args:
        x_TD: (T, D) tokens.
        rows: the token of each row.

    Returns:
        (N, D), for each row a copy of its token.
    """
    return _Dispatch.apply(x_TD, *_places(rows))


def rows_to_tokens(rows_ND: Tensor, gates_N: Tensor, mean: bool, rows: Rows
                   ) -> Tensor:
    """Sum the rows of each token (combine).

    Backward acts as if each row had been multiplied by its gate, for either
    value of ``mean``.

    Args:
        rows_ND: (N, D) outputs of the experts.
        gates_N: (N,) float32, zero for unserved rows.
        mean: True takes the mean of a token's rows in forward, whatever the
            gates are. This is RMoE's alignment, sum sg[(1/n - w) E] + w E
            (sg: stop gradient), in one pass. False takes the sum weighted by
            the gates.
        rows: the token of each row.

    Returns:
        (T, D), zeros for a token without a served row.
    """
    return _Combine.apply(rows_ND, gates_N, mean, *_places(rows))


def _places(rows: Rows) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
    """The parts of ``rows`` that say where a token's rows are. They are
    unpacked because autograd functions take tensors, not a ``Rows``."""
    order_N, starts = rows.by_token or (None, None)
    return rows.token_ids_N, rows.num_tokens, order_N, starts


def _sum_rows(rows_ND: Tensor, weights_N: Tensor | None, mean: bool,
              token_ids_N: Tensor, num_tokens: int, order_N: Tensor | None,
              starts: Tensor | None) -> Tensor:
    """(T, D), the sum or mean of each token's rows; zeros for none."""
    if weights_N is not None:
        weights_N = weights_N.to(rows_ND.dtype)
    if order_N is None or starts is None:
        # Each token has one row.
        if weights_N is not None:
            rows_ND = rows_ND * weights_N[:, None]
        return _put(rows_ND, token_ids_N)
    if compat.is_exporting() or rows_ND.device.type not in BAGS:
        return _sum_by_adding(rows_ND, weights_N, mean, token_ids_N,
                              num_tokens, order_N, starts)
    if weights_N is not None:
        weights_N = weights_N.index_select(0, order_N)
    # The last bag ends where the rows end, so that its end need not be
    # passed; see order_by_token. Bags behind the T-th hold unserved rows.
    return torch.embedding_bag(
        rows_ND, order_N, starts[:-1], scale_grad_by_freq=False,
        mode=1 if mean else 0, sparse=False, per_sample_weights=weights_N,
        include_last_offset=False)[0][:num_tokens]


def _put(rows_ND: Tensor, token_ids_N: Tensor) -> Tensor:
    """(T, D), each row at the place of its token; N equals T."""
    if not host_may_read(rows_ND):
        return torch.empty_like(rows_ND).index_copy_(0, token_ids_N, rows_ND)
    # On the CPU, inverting the order and gathering takes two operators more
    # than index_copy_ but a quarter of its time.
    row_N = torch.arange(len(token_ids_N), device=token_ids_N.device)
    return rows_ND.index_select(
        0, torch.empty_like(row_N).scatter_(0, token_ids_N, row_N))


def _sum_by_adding(rows_ND: Tensor, weights_N: Tensor | None, mean: bool,
                   token_ids_N: Tensor, num_tokens: int, order_N: Tensor,
                   starts: Tensor) -> Tensor:
    """The same as ``_sum_rows`` where embedding_bag is missing."""
    if weights_N is not None:
        rows_ND = rows_ND * weights_N[:, None]
    if len(starts) > num_tokens + 1:
        # Some rows are unserved. They come last in the order by token and
        # may hold nan, which a weight of zero would not remove.
        place_N = torch.zeros_like(order_N).scatter(
            0, order_N, torch.arange(len(order_N), device=order_N.device))
        rows_ND = rows_ND.masked_fill(
            (place_N >= starts[num_tokens])[:, None], 0.)
    out_TD = rows_ND.new_zeros(num_tokens, rows_ND.shape[1]).index_add(
        0, token_ids_N, rows_ND)
    if not mean:
        return out_TD
    kept_T = kept_per_token(starts, num_tokens).clamp_min(1)
    return out_TD / kept_T[:, None].to(out_TD.dtype)


class _Dispatch(torch.autograd.Function):
    """Copy tokens to their rows: (T, D) -> (N, D)."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, token_ids_N: Tensor, num_tokens: int,
                order_N: Tensor | None, starts: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_ids_N, order_N, starts)
        ctx.num_tokens = num_tokens
        return x_TD.index_select(0, token_ids_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        token_ids_N, order_N, starts = ctx.saved_tensors
        grad_TD = _sum_rows(grad_ND, None, False, token_ids_N,
                            ctx.num_tokens, order_N, starts)
        return grad_TD, None, None, None, None


class _Combine(torch.autograd.Function):
    """Sum each token's rows: (N, D) -> (T, D)."""

    @staticmethod
    def forward(ctx, rows_ND: Tensor, gates_N: Tensor, mean: bool,
                token_ids_N: Tensor, num_tokens: int, order_N: Tensor | None,
                starts: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows_ND, gates_N, token_ids_N)
        return _sum_rows(rows_ND, None if mean else gates_N, mean,
                         token_ids_N, num_tokens, order_N, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        rows_ND, gates_N, token_ids_N = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, token_ids_N)
        grad_gates = None
        if ctx.needs_input_grad[1]:
            grad_gates = (grad_ND.float() * rows_ND).sum(1)
        grad_ND *= gates_N.to(grad_ND.dtype)[:, None]
        return grad_ND, grad_gates, None, None, None, None, None
