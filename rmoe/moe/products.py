"""The matrix product that experts are made of."""
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe import compat

_PADDING = ContextVar('padding', default=True)


def linear(x_NI: Tensor, weight_OI: Tensor,
           bias_O: Tensor | None = None) -> Tensor:
    """(N, O) = x W^T + b, without gradient, as fast as the device allows.

    On the CPU PyTorch leaves float32 products to MKL, which uses AVX-512 on
    Intel's processors alone; oneDNN, which PyTorch has too, uses it on all.
    ``torch.backends.mkldnn.flags(enabled=False)`` goes back to MKL.

    Args:
        x_NI: (N, I) in any layout; copied where it is not contiguous.
        weight_OI: (O, I) in any layout.
        bias_O: (O,).
    """
    if _onednn_is_faster(x_NI):
        return torch.ops.mkldnn._linear_pointwise(
            x_NI, weight_OI, bias_O, 'none', [], '')
    return F.linear(x_NI, weight_OI, bias_O)


def pad_rows(rows_NI: Tensor) -> Tensor:
    """(M, I) with M >= N: zero rows up to a size that comes up often.

    oneDNN compiles a kernel for every shape, which takes as long as a small
    product, and keeps those it met. Experts get another number of rows in
    every step, so numbers are rounded up to one of 16 between a power of two
    and the next.
    """
    if not _PADDING.get():
        return rows_NI
    count = len(rows_NI)
    multiple = 1 << max(0, (count - 1).bit_length() - 5)
    missing = -count % multiple
    if not missing or not _onednn_is_faster(rows_NI):
        return rows_NI
    return F.pad(rows_NI, (0, 0, 0, missing))


@contextmanager
def unpadded() -> Iterator[None]:
    """Let ``pad_rows`` do nothing, for those who count operations."""
    token = _PADDING.set(False)
    try:
        yield
    finally:
        _PADDING.reset(token)


def _onednn_is_faster(x: Tensor) -> bool:
    # Other types go there by themselves.
    return (_HAS_ONEDNN and x.device.type == 'cpu' and
            x.dtype == torch.float32 and bool(torch.backends.mkldnn.enabled))


# The operator is what torch.compile makes of a linear layer on the CPU.
_HAS_ONEDNN = (torch.backends.mkldnn.is_available() and
               torch.backends.cpu.get_cpu_capability() == 'AVX512' and
               '_linear_pointwise' in dir(torch.ops.mkldnn))

if _HAS_ONEDNN:
    @compat.register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        """So that torch's counter, which does not know it, counts it."""
        return 2 * x_shape[0] * x_shape[1] * weight_shape[0]

if compat.grouped_mm_operator is not None:
    @compat.register_flop_formula(compat.grouped_mm_operator)
    def _grouped_flops(a_shape, b_shape, *args, out_shape=None, **kwargs
                       ) -> int:
        """So that torch's counter knows what F.grouped_mm runs, forward and
        backward.

        Rows by experts' weights, (N, I) and (E, I, O), are 2 N I O. So are
        gradients of weights, (I, N) and (N, O), whose groups divide N. Rows
        behind the last offset count too, which a kernel leaves out: to know
        them is to read the offsets, for which a GPU would have to wait.
        """
        groups = a_shape[0] if len(a_shape) == len(b_shape) == 3 else 1
        return 2 * groups * a_shape[-2] * a_shape[-1] * b_shape[-1]
