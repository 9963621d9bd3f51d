"""From tokens to rows and back, without parameters.

Forward and backward only gather, never scatter-add, so results are the same
on every run. Axis letters as in routing.py.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rows_of_tokens(token_ids_N: Tensor, num_tokens: int) -> Tensor:
    """The transposed view of a dispatch: which rows hold each token.

    Returns:
        (T, K) int64 with K the largest number of rows of a token; N marks an
        empty place.
    """
    num_rows = len(token_ids_N)
    counts_T = torch.bincount(token_ids_N, minlength=num_tokens)
    most = int(counts_T.max()) if num_tokens else 0
    arange_N = torch.arange(num_rows, device=token_ids_N.device)
    if most == 1:
        table_T = token_ids_N.new_full((num_tokens, ), num_rows)
        return table_T.scatter_(0, token_ids_N, arange_N)[:, None]
    order_N = torch.sort(token_ids_N, stable=True).indices
    if num_rows == num_tokens * most:
        return order_N.view(num_tokens, most)
    sorted_N = token_ids_N[order_N]
    place_N = arange_N - (counts_T.cumsum(0) - counts_T)[sorted_N]
    table_TK = token_ids_N.new_full((num_tokens, most), num_rows)
    table_TK[sorted_N, place_N] = order_N
    return table_TK


def _gather_sum(rows_ND: Tensor, table_TK: Tensor,
                coefficients_N: Tensor | None) -> Tensor:
    """(T, D), for each token the (weighted) sum of its rows."""
    if coefficients_N is not None:
        rows_ND = rows_ND * coefficients_N.to(rows_ND.dtype)[:, None]
    if table_TK.numel() != len(rows_ND):
        # What empty places point at.
        rows_ND = torch.cat([rows_ND, rows_ND.new_zeros(1, rows_ND.shape[1])])
    if not table_TK.shape[1]:
        return rows_ND.new_zeros(len(table_TK), rows_ND.shape[1])
    first_T, *others = table_TK.unbind(1)
    out_TD = rows_ND.index_select(0, first_T)
    for place_T in others:
        out_TD += rows_ND.index_select(0, place_T)
    return out_TD


class Dispatch(torch.autograd.Function):
    """Copy tokens to their rows: (T, D) -> (N, D)."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, token_ids_N: Tensor, table_TK: Tensor
                ) -> Tensor:
        ctx.save_for_backward(table_TK)
        return x_TD.index_select(0, token_ids_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        table_TK, = ctx.saved_tensors
        return _gather_sum(grad_ND, table_TK, None), None, None


class Combine(torch.autograd.Function):
    """Sum each token's rows: (N, D) -> (T, D).

    Forward multiplies rows by ``scale_N`` (None: by one); backward acts as if
    they had been multiplied by ``gates_N``. With scale = 1/n this is RMoE's
    alignment, sum sg[(1/n - w) E] + w E, in one pass; with scale = gates it
    is the plain weighted sum.
    """

    @staticmethod
    def forward(ctx, rows_ND: Tensor, gates_N: Tensor,
                scale_N: Tensor | None, token_ids_N: Tensor, table_TK: Tensor
                ) -> Tensor:
        ctx.save_for_backward(rows_ND, gates_N, token_ids_N)
        return _gather_sum(rows_ND, table_TK, scale_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        rows_ND, gates_N, token_ids_N = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, token_ids_N)
        grad_gates = None
        if ctx.needs_input_grad[1]:
            grad_gates = torch.linalg.vecdot(grad_ND.float(),
                                             rows_ND.float())
        grad_ND *= gates_N.to(grad_ND.dtype)[:, None]
        return grad_ND, grad_gates, None, None, None
