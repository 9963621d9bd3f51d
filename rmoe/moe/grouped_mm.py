"""Linear layers of all experts by torch's grouped matrix product.

This is the fast path on GPUs. One kernel computes all experts and reads from
the device where the rows of each expert end, so the host need not wait. Axis
letters as in routing.py; O and I are the output and input width.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmoe import compat
from rmoe.moe.host import host_may_read
from rmoe.moe.rows import Rows
from rmoe.moe.weights import add_and_round

# The kernel needs rows that begin at multiples of 16 bytes; these are the
# bfloat16 values in 16 bytes.
MULTIPLE = 8


def fits(rows_ND: Tensor, widths: tuple[int, int]) -> bool:
    """Return True if there is a fast kernel for these rows. PyTorch documents
    one for bfloat16 on GPUs of compute capability 8.0 and newer.

    Args:
        rows_ND: (N, D), on the device that computes.
        widths: D and H.
    """
    if (compat.grouped_mm is None or host_may_read(rows_ND)
            or rows_ND.dtype != torch.bfloat16
            or any(width % MULTIPLE for width in widths)):
        return False
    if not rows_ND.is_cuda:
        # A graph traced on the CPU is for other runtimes, which may not have
        # the kernel. Eager calls on the CPU are tests of this path.
        return not compat.is_compiling() and rows_ND.device.type == 'cpu'
    return torch.cuda.get_device_capability(rows_ND.device) >= (8, 0)


def linear(rows_NI: Tensor, rows: Rows, weight_EOI: Tensor,
           core_bias_O: Tensor | None, bias_EO: Tensor | None) -> Tensor:
    """(N, O), the linear layer of each expert applied to its rows.

    Args:
        rows_NI: (N, I) bfloat16. Unserved rows may hold arbitrary values, and
            so do their results.
        rows: the expert of each row.
        weight_EOI: core + residual, in the type of the rows.
        core_bias_O: added to each expert's bias; None for nothing.
        bias_EO: the experts' own biases; None for none.
    """
    return _Linear.apply(rows_NI, weight_EOI, core_bias_O, bias_EO,
                         rows.ends_E, rows.expert_ids_N, rows.unserved_N)


class _Linear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, rows_NI: Tensor, weight_EOI: Tensor,
                core_bias_O: Tensor | None, bias_EO: Tensor | None,
                ends_E: Tensor, expert_ids_N: Tensor,
                unserved_N: Tensor | None) -> Tensor:
        assert compat.grouped_mm is not None
        ctx.save_for_backward(rows_NI, weight_EOI, ends_E, expert_ids_N,
                              unserved_N)
        out_NO = compat.grouped_mm(rows_NI, weight_EOI.mT, offs=ends_E)
        if bias_EO is not None:
            bias_EO = (bias_EO.to(out_NO.dtype) if core_bias_O is None else
                       add_and_round(core_bias_O, bias_EO, out_NO.dtype))
            out_NO += bias_EO.index_select(0, expert_ids_N)
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO: Tensor):
        assert compat.grouped_mm is not None
        rows_NI, weight_EOI, ends_E, expert_ids_N, unserved_N = (
            ctx.saved_tensors)
        needs_rows, needs_weight, needs_core, needs_bias = (
            ctx.needs_input_grad[:4])
        grad_NO = grad_NO.contiguous()
        if unserved_N is not None:
            # Unserved rows may hold nan, and 0 * nan is nan: their gradients
            # are set to zero, not multiplied by it.
            grad_NO = grad_NO.masked_fill(unserved_N[:, None], 0.)
        grad_rows = grad_weight = grad_core = grad_bias = None
        if needs_rows:
            grad_rows = compat.grouped_mm(grad_NO, weight_EOI, offs=ends_E)
        if needs_weight:
            grad_weight = compat.grouped_mm(grad_NO.mT, rows_NI, offs=ends_E)
        if needs_core or needs_bias:
            grad_bias = sum_of_experts(grad_NO, expert_ids_N, len(ends_E))
            grad_core = grad_bias.sum(0) if needs_core else None
        return (grad_rows, grad_weight, grad_core,
                grad_bias if needs_bias else None, None, None, None)


def sum_of_experts(rows_NO: Tensor, expert_ids_N: Tensor, num_experts: int
                   ) -> Tensor:
    """(E, O) float32, the sum of each expert's rows.

    It is computed as a matrix product with zeros and ones, which sums in
    float32. Adding rows one by one in bfloat16 would lose all that is smaller
    than the last digit of the sum, which after some hundred rows is most of
    each row. There are no atomic additions, so the result is the same on every
    run.
    """
    experts_E1 = torch.arange(num_experts, dtype=expert_ids_N.dtype,
                              device=expert_ids_N.device)[:, None]
    own_EN = experts_E1 == expert_ids_N
    if rows_NO.is_cuda and compat.mm_keeps_float32:
        return torch.mm(own_EN.to(rows_NO.dtype), rows_NO,
                        out_dtype=torch.float32)
    return own_EN.float() @ rows_NO.float()
