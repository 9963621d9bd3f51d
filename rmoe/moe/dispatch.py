"""Kernels without parameters: gather rows, multiply by group, combine.

Forward and backward only gather, never scatter-add, so results are the same
on every run. Axis letters as in routing.py; O and I are the output and input
width of a linear map, R the rank of a low-rank residual.
"""
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GroupedLinear(torch.autograd.Function):
    """rows of expert e times (core + residual_e), for every expert.

    ``core + residual_e`` is folded one expert at a time into a scratch
    buffer that stays in cache, in forward and again in backward; gradients
    are written in place into their slice. An expert without rows takes part
    with a zero gradient. Without a bias, neither side has one.
    """

    @staticmethod
    def forward(ctx, rows_NI: Tensor, counts: Sequence[int],
                core_weight_OI: Tensor | None, core_bias_O: Tensor | None,
                bias_EO: Tensor | None, *residual: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NI, core_weight_OI, *residual)
        ctx.counts = counts
        bias = None
        if bias_EO is not None:
            bias = bias_EO if core_bias_O is None else bias_EO + core_bias_O
            bias = bias.to(rows_NI.dtype)
        out_NO = rows_NI.new_empty(len(rows_NI), residual[0].shape[1])
        fold = _Fold(core_weight_OI, residual, rows_NI.dtype)
        for expert, rows in _segments(counts):
            if bias is None:
                torch.mm(rows_NI[rows], fold(expert).t(), out=out_NO[rows])
            else:
                torch.addmm(bias[expert], rows_NI[rows], fold(expert).t(),
                            out=out_NO[rows])
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO: Tensor):
        rows_NI, core_weight_OI, *residual = ctx.saved_tensors
        (needs_rows, _, needs_core, needs_core_bias, needs_bias,
         *needs_residual) = ctx.needs_input_grad
        grad_NO = grad_NO.contiguous()
        fold = _Fold(core_weight_OI, residual, rows_NI.dtype)
        grad_rows = torch.empty_like(rows_NI) if needs_rows else None
        grad_core = (torch.zeros_like(core_weight_OI)
                     if needs_core else None)
        grad_residual = [torch.zeros_like(part) if not all(ctx.counts)
                         else torch.empty_like(part) for part in residual
                         ] if any(needs_residual) else []
        for expert, rows in _segments(ctx.counts):
            grad = grad_NO[rows]
            if grad_rows is not None:
                torch.mm(grad, fold(expert), out=grad_rows[rows])
            if grad_residual:
                weight_grad = _weight_grad(grad, rows_NI[rows], expert,
                                           residual, grad_residual)
                if grad_core is not None:
                    grad_core += weight_grad
        if grad_core is not None and not grad_residual:
            # One product over all rows: the sum over experts is implied.
            grad_core = (grad_NO.t() @ rows_NI).to(grad_core.dtype)
        # Cheap beside the products, so computed whoever asks for it.
        grad_bias = torch.stack([
            part.sum(0, dtype=torch.float32)
            for part in grad_NO.split(ctx.counts)
        ])
        return (grad_rows, None, grad_core,
                grad_bias.sum(0) if needs_core_bias else None,
                grad_bias if needs_bias else None,
                *(grad_residual or len(residual) * (None, )))


class _Fold:
    """core + residual of one expert at a time, in a reused buffer."""

    def __init__(self, core_OI: Tensor | None, residual: Sequence[Tensor],
                 dtype: torch.dtype) -> None:
        self.core_OI, self.residual, self.dtype = core_OI, residual, dtype
        if core_OI is not None:
            self.scratch = torch.empty_like(core_OI)

    def __call__(self, expert: int) -> Tensor:
        if self.core_OI is None:
            return self.residual[0][expert].to(self.dtype)
        if len(self.residual) == 1:
            torch.add(self.core_OI, self.residual[0][expert],
                      out=self.scratch)
        else:
            up_EOR, down_ERI = self.residual
            torch.addmm(self.core_OI, up_EOR[expert], down_ERI[expert],
                        out=self.scratch)
        return self.scratch.to(self.dtype)


def _weight_grad(grad: Tensor, rows: Tensor, expert: int,
                 residual: Sequence[Tensor], grad_residual: Sequence[Tensor]
                 ) -> Tensor:
    """Write the gradient of one expert's residual; return that of its
    folded weight."""
    if len(residual) == 1:
        out = grad_residual[0][expert]
        if out.dtype == grad.dtype:
            return torch.mm(grad.t(), rows, out=out)
        return out.copy_(grad.t() @ rows)
    up_EOR, down_ERI = residual
    weight_grad = (grad.t() @ rows).to(up_EOR.dtype)
    torch.mm(weight_grad, down_ERI[expert].t(), out=grad_residual[0][expert])
    torch.mm(up_EOR[expert].t(), weight_grad, out=grad_residual[1][expert])
    return weight_grad


def _segments(counts: Sequence[int]):
    """(expert, slice of its rows) for every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


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
    num_rows, num_tokens = len(rows_ND), len(table_TK)
    out_TD = None
    if num_rows:
        # A full table needs neither clamping nor masking.
        full = table_TK.numel() == num_rows
        for place_T in table_TK.unbind(1):
            index_T = place_T if full else place_T.clamp_max(num_rows - 1)
            part_TD = rows_ND.index_select(0, index_T)
            if coefficients_N is not None:
                part_TD *= coefficients_N[index_T].to(part_TD.dtype)[:, None]
            if not full:
                part_TD.masked_fill_((place_T == num_rows)[:, None], 0)
            out_TD = part_TD if out_TD is None else out_TD.add_(part_TD)
    if out_TD is None:
        out_TD = rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
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
