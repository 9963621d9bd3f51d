"""The matrix product of the experts on the CPU, and its operation count.

:mod:`rmoe.moe.grouped` computes every linear layer with :func:`linear`.
"""
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

    On the CPU, PyTorch computes float32 products with MKL, which uses AVX-512
    only on Intel's processors. oneDNN, which PyTorch also contains, uses it on
    all processors that have it, so it is called here where that is so.
    ``torch.backends.mkldnn.flags(enabled=False)`` goes back to MKL.

    Args:
        x_NI: (N, I) in any layout; copied if it is not contiguous.
        weight_OI: (O, I) in any layout.
        bias_O: (O,).
    """
    if _onednn_is_faster(x_NI):
        return torch.ops.mkldnn._linear_pointwise(
            x_NI, weight_OI, bias_O, 'none', [], '')
    return F.linear(x_NI, weight_OI, bias_O)


def pad_rows(rows_NI: Tensor) -> Tensor:
    """Append zero rows up to one of few sizes: (N, I) to (M, I), M >= N.

    oneDNN compiles a kernel for every new shape, which takes as long as a
    small product, and keeps it for the next time. Experts get another number
    of rows in every step, so that most shapes would be new. The number is
    therefore rounded up to one of 16 sizes between a power of two and the
    next.
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
    """Switch ``pad_rows`` off, so that padding is not counted as
    operations."""
    token = _PADDING.set(False)
    try:
        yield
    finally:
        _PADDING.reset(token)


def _onednn_is_faster(x: Tensor) -> bool:
    # For types other than float32, PyTorch chooses oneDNN by itself.
    return (_HAS_ONEDNN and x.device.type == 'cpu' and
            x.dtype == torch.float32 and bool(torch.backends.mkldnn.enabled))


# torch.compile turns linear layers on the CPU into this operator; it is not
# public, so its presence is checked.
_HAS_ONEDNN = (torch.backends.mkldnn.is_available() and
               torch.backends.cpu.get_cpu_capability() == 'AVX512' and
               '_linear_pointwise' in dir(torch.ops.mkldnn))

if _HAS_ONEDNN:
    @compat.register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        """Tell torch's FLOP counter what the operator costs, which the
        counter does not know."""
        return 2 * x_shape[0] * x_shape[1] * weight_shape[0]

if compat.grouped_mm_operator is not None:
    @compat.register_flop_formula(compat.grouped_mm_operator)
    def _grouped_flops(a_shape, b_shape, *args, out_shape=None, **kwargs
                       ) -> int:
        """Tell torch's FLOP counter what the operator behind F.grouped_mm
        costs, forward and backward.

        Rows times experts' weights, (N, I) and (E, I, O), take 2 N I O
        operations. So do the gradients of weights, (I, N) and (N, O), where
        the groups divide N. Rows behind the last offset, which a kernel
        skips, are counted too: their number is in the offsets, and reading
        those would make a GPU wait.
        """
        groups = a_shape[0] if len(a_shape) == len(b_shape) == 3 else 1
        return 2 * groups * a_shape[-2] * a_shape[-1] * b_shape[-1]
