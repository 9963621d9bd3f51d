"""Adds the core to the residuals of all experts: w_e = w_core + r_e
(2204.09636).

Axis letters as in routing.py; O and I are the output and input width of a
linear layer, R the rank of a low-rank residual.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmoe import compat


def add_core(core_OI: Tensor, residual: tuple[Tensor, ...], dtype: torch.dtype
             ) -> Tensor:
    """(E, O, I), core + residual, added in float32 and rounded once.

    Args:
        core_OI: (O, I).
        residual: (E, O, I), or (E, O, R) and (E, R, I), whose product is the
            residual.
        dtype: type of the result.
    """
    if len(residual) == 2:
        return torch.baddbmm(core_OI, *residual).to(dtype)
    return _AddCore.apply(core_OI, residual[0], dtype)


def add_and_round(core: Tensor, residual_E: Tensor, dtype: torch.dtype
                  ) -> Tensor:
    """(E, ...), core + residual, without gradient. Adding and rounding are
    done in one pass over memory instead of two."""
    if compat.is_compiling():
        # The compiler fuses the two itself.
        return (core + residual_E).to(dtype)
    return torch.add(core, residual_E,
                     out=torch.empty_like(residual_E, dtype=dtype))


class _AddCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, core_OI: Tensor, residual_EOI: Tensor,
                dtype: torch.dtype) -> Tensor:
        ctx.core_dtype, ctx.dtype = core_OI.dtype, residual_EOI.dtype
        return add_and_round(core_OI, residual_EOI, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_EOI: Tensor):
        needs_core, needs_residual, _ = ctx.needs_input_grad
        return (grad_EOI.sum(0, dtype=torch.float32).to(ctx.core_dtype)
                if needs_core else None,
                grad_EOI.to(ctx.dtype) if needs_residual else None, None)
