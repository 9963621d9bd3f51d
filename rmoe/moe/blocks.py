"""Linear layers of all experts as batched products over blocks of rows.

This is the path of accelerators where the grouped product
(:mod:`rmoe.moe.grouped_mm`) does not fit. Rows are laid out in blocks of b
rows, and each block belongs to one expert. So a linear layer is one batched
product with the weights gathered by block (the idea of MegaBlocks,
2211.15841). An expert with c rows fills ceil(c / b) blocks, the last one only
in part. However the rows are spread over E experts, (N + E (b - 1)) / b blocks
can hold them all. With b = N / (4 E) these are at most 1.25 times as many
multiplications as for the rows alone, with b = N / E twice as many. Shapes
depend on sizes and options alone, never on the router's decisions.

Axis letters as in routing.py; J blocks, b rows of a block, P = J b places; O
and I are the output and input width of a linear layer.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmoe.moe.rows import Rows

# Smaller blocks waste fewer multiplications on empty places. With fewer rows
# per block than this, gathering the weights of the blocks costs more than
# they save.
SMALLEST_BLOCK = 128
BLOCKS_PER_EXPERT = 4


@dataclass(frozen=True)
class Blocks:
    """A layout of rows in blocks.

    Attributes:
        expert_J: (J,) int64, the expert of each block.
        row_P: (P,) int64, the row in each place; an arbitrary valid index if
            the place is empty.
        empty_P: (P,) bool, True for empty places.
        place_N: (N,) int64, the place of each row; an arbitrary valid index
            for an unserved row.
        unserved_N: see :class:`rmoe.moe.rows.Rows`.
    """
    expert_J: Tensor
    row_P: Tensor
    empty_P: Tensor
    place_N: Tensor
    unserved_N: Tensor | None

    def fill(self, rows_ND: Tensor) -> Tensor:
        """(J, b, D), the rows in their places; empty places hold zeros."""
        x_PD = _Gather.apply(rows_ND, self.row_P, self.empty_P, self.place_N,
                             self.unserved_N)
        return x_PD.unflatten(0, (len(self.expert_J), -1))

    def rows(self, x_JBD: Tensor) -> Tensor:
        """(N, D), the rows taken from their places; unserved rows are
        zero."""
        return _Gather.apply(x_JBD.flatten(0, 1), self.place_N, self.unserved_N,
                             self.row_P, self.empty_P)

    def weights(self, stacked_E: Tensor) -> Tensor:
        """(J, ...), the part of a stacked (E, ...) parameter that belongs to
        each block's expert."""
        return _Repeat.apply(stacked_E, self.expert_J)


def layout(num_rows: int, num_experts: int, max_rows: int) -> tuple[int, int]:
    """Choose the number of blocks and their size.

    Args:
        num_rows: N.
        num_experts: E.
        max_rows: an upper bound of the rows of an expert.

    Returns:
        J and b. One block for each expert, if that takes no more places.
    """
    fair = max(-(-num_rows // num_experts), 1)
    size = min(fair, max(-(-num_rows // (BLOCKS_PER_EXPERT * num_experts)),
                         SMALLEST_BLOCK))
    count = (num_rows + num_experts * (size - 1)) // size
    if num_experts * max_rows <= count * size:
        return num_experts, max_rows
    return count, size


def lay_out(rows: Rows) -> Blocks:
    """Arrange rows in blocks."""
    num_rows, num_experts = len(rows.token_ids_N), len(rows.ends_E)
    device = rows.ends_E.device
    count, size = layout(num_rows, num_experts, rows.max_rows)
    ends_E, counts_E = rows.ends_E.long(), rows.counts_E.long()
    blocks_E = (counts_E + size - 1).div(size, rounding_mode='floor')
    block_ends_E = blocks_E.cumsum(0)
    # starts_E is where an expert's rows begin among all rows, first_E where
    # they begin among the places.
    starts_E = ends_E - counts_E
    first_E = (block_ends_E - blocks_E) * size
    expert_J = _interval(torch.arange(count, device=device), block_ends_E)
    place_JB = torch.arange(count * size, device=device).view(count, size)
    inside_JB = place_JB - first_E[expert_J][:, None]
    row_JB = starts_E[expert_J][:, None] + inside_JB
    row_N = torch.arange(num_rows, device=device)
    shift_E = first_E - starts_E
    place_N = row_N + shift_E.index_select(0, rows.expert_ids_N)
    return Blocks(
        expert_J, row_JB.flatten().clamp_max(max(num_rows - 1, 0)),
        (inside_JB >= counts_E[expert_J][:, None]).flatten(),
        place_N.clamp_max(max(count * size - 1, 0)), rows.unserved_N)


def _interval(position: Tensor, ends_E: Tensor) -> Tensor:
    """The index of the first end that is larger than each position; the last
    index if none is."""
    return (position[:, None] >= ends_E[:-1]).sum(1)


def linear(x_JBI: Tensor, weight_JOI: Tensor, bias_JO: Tensor | None
           ) -> Tensor:
    """(J, b, O), one linear layer applied to the blocks.

    Args:
        x_JBI: (J, b, I) rows in blocks.
        weight_JOI: the weights (core + residual) of each block's expert, in
            the type of the rows.
        bias_JO: the biases of each block's expert, in float32 like their
            gradients; None for none.
    """
    return _Linear.apply(x_JBI, weight_JOI, bias_JO)


class _Linear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x_JBI: Tensor, weight_JOI: Tensor,
                bias_JO: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_JBI, weight_JOI)
        if bias_JO is None:
            return torch.bmm(x_JBI, weight_JOI.mT)
        return torch.baddbmm(bias_JO.to(x_JBI.dtype)[:, None], x_JBI,
                             weight_JOI.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_JBO: Tensor):
        x_JBI, weight_JOI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (torch.bmm(grad_JBO, weight_JOI) if needs_x else None,
                torch.bmm(grad_JBO.mT, x_JBI) if needs_weight else None,
                grad_JBO.sum(1, dtype=torch.float32) if needs_bias else None)


def move_rows(x_ND: Tensor, from_N: Tensor, back_N: Tensor) -> Tensor:
    """(N, D), the rows in another order.

    Args:
        x_ND: (N, D).
        from_N: (N,) int64, the row that comes to each place.
        back_N: (N,) int64, the inverse permutation.
    """
    return _Gather.apply(x_ND, from_N, None, back_N, None)


class _Gather(torch.autograd.Function):
    """Move rows to other places. Backward only gathers too, because no place
    gets two rows."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, from_M: Tensor, empty_M: Tensor | None,
                back_N: Tensor, unused_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(back_N, unused_N)
        return _gather(x_ND, from_M, empty_M)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MD: Tensor):
        return _gather(grad_MD, *ctx.saved_tensors), None, None, None, None


def _gather(x_ND: Tensor, from_M: Tensor, empty_M: Tensor | None) -> Tensor:
    out_MD = x_ND.index_select(0, from_M)
    # Places without a row hold a copy of an arbitrary row, which may be nan.
    # They are set to zero, or that nan would reach the gradient of the
    # weights.
    return out_MD if empty_M is None else out_MD.masked_fill(
        empty_M[:, None], 0.)


class _Repeat(torch.autograd.Function):
    """Gather the parts of a stack that belong to the blocks' experts. A part
    may occur several times, and backward sums its gradients."""

    @staticmethod
    def forward(ctx, stacked_E: Tensor, expert_J: Tensor) -> Tensor:
        ctx.save_for_backward(expert_J)
        ctx.shape = stacked_E.shape
        return stacked_E.index_select(0, expert_J)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_J: Tensor):
        expert_J, = ctx.saved_tensors
        experts_E1 = torch.arange(ctx.shape[0], device=grad_J.device)[:, None]
        own_EJ = (experts_E1 == expert_J).to(grad_J.dtype)
        return (own_EJ @ grad_J.flatten(1)).view(ctx.shape), None
