"""Experts in fixed shapes, exact for any load: for tracing.

Rows are laid out in blocks of b rows, each block belonging to one expert, so
that a linear layer is one batched product with the weights gathered by
block (the idea of MegaBlocks, 2211.15841). An expert with c rows fills
ceil(c / b) blocks, the last one in part: however the rows fall on E experts,
(N + E (b - 1)) / b blocks hold them all. With b = N / (4 E) that is at most
1.25 times the products of the rows, with b = N / E twice.

Axis letters as in routing.py; J blocks, b rows of a block, P = J b places.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rmoe import compat
from rmoe.moe.assignment import top_k
from rmoe.moe.experts import Core, Experts
from rmoe.moe.routing import StaticRouting

# Smaller blocks waste fewer products; below so many rows, gathering a
# block's weights costs more than that.
SMALLEST_BLOCK = 128
BLOCKS_PER_EXPERT = 4
Middle = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Blocks:
    """Rows in blocks.

    Attributes:
        expert_J: (J,) int64, the expert of each block.
        row_P: (P,) int64, the row in each place; any where there is none.
        filled_P: (P,) bool, whether there is a row.
        place_N: (N,) int64, the place of each row; any for a row that nobody
            serves.
    """
    expert_J: Tensor
    row_P: Tensor
    filled_P: Tensor
    place_N: Tensor


def layout(num_rows: int, num_experts: int, max_rows: int) -> tuple[int, int]:
    """How many blocks of how many rows.

    Args:
        num_rows: N.
        num_experts: E.
        max_rows: no expert has more.
    """
    fair = max(-(-num_rows // num_experts), 1)
    size = min(fair, max(-(-num_rows // (BLOCKS_PER_EXPERT * num_experts)),
                         SMALLEST_BLOCK))
    count = (num_rows + num_experts * (size - 1)) // size
    if num_experts * max_rows <= count * size:
        return num_experts, max_rows
    return count, size


def lay_out(counts_E: Tensor, num_rows: int, max_rows: int) -> Blocks:
    """Arrange rows that are sorted by expert.

    Args:
        counts_E: (E,) int64.
        num_rows: N, at least the sum of the counts.
        max_rows: no expert has more.
    """
    num_experts, device = len(counts_E), counts_E.device
    count, size = layout(num_rows, num_experts, max_rows)
    ends_E = counts_E.cumsum(0)
    blocks_E = (counts_E + size - 1) // size
    block_ends_E = blocks_E.cumsum(0)
    # Where an expert's rows begin, among rows and among places.
    starts_E = ends_E - counts_E
    first_E = (block_ends_E - blocks_E) * size
    expert_J = _interval(torch.arange(count, device=device), block_ends_E)
    place_P = torch.arange(count * size, device=device)
    expert_P = expert_J[place_P // size]
    inside_P = place_P - first_E[expert_P]
    row_P = starts_E[expert_P] + inside_P
    row_N = torch.arange(num_rows, device=device)
    expert_N = _interval(row_N, ends_E)
    place_N = first_E[expert_N] + row_N - starts_E[expert_N]
    return Blocks(
        expert_J, row_P.clamp_max(num_rows - 1),
        inside_P < counts_E[expert_P], place_N.clamp_max(count * size - 1))


def _interval(position: Tensor, ends_E: Tensor) -> Tensor:
    """The first end that lies behind a position; the last one for others."""
    return (position[:, None] >= ends_E[:-1]).sum(1)


def mix_sparse(x_TD: Tensor, routing: StaticRouting, experts: Experts,
               core: Core | None, align: str, unrouted: str,
               middle: Middle | None = None) -> Tensor:
    """See :func:`rmoe.moe.mixing.mix_sparse`."""
    token_ids_N = routing.token_ids_N
    blocks = lay_out(routing.counts_E, len(token_ids_N), routing.max_rows)
    token_P = token_ids_N[blocks.row_P]
    # Not left as they are: what is in a place without a row may be nan, and
    # would reach the gradient of the weights.
    x_PD = x_TD[token_P].masked_fill(~blocks.filled_P[:, None], 0.)
    if middle is not None:
        assert routing.complete
        middle = partial(_through_rows, blocks,
                         partial(middle, _rows_of_tokens(routing)))
    x_JBD = x_PD.unflatten(0, (len(blocks.expert_J), -1))
    y_PD = apply_experts(x_JBD, blocks.expert_J, experts, core,
                         middle).flatten(0, 1)
    y_PD = _weigh(y_PD, routing, align, blocks).masked_fill(
        ~blocks.filled_P[:, None], 0.)
    y_TD = y_PD.new_zeros(x_TD.shape).index_add(0, token_P, y_PD)
    if unrouted == 'core' and not routing.complete:
        assert core is not None
        kept_T1 = routing.kept_per_token()[:, None] > 0
        y_TD = torch.where(kept_T1, y_TD, core(x_TD).to(y_TD.dtype))
    return y_TD


def _weigh(y_PD: Tensor, routing: StaticRouting, align: str, blocks: Blocks
           ) -> Tensor:
    """Outputs times gates; forward and backward as ``align`` says."""
    token_ids_N, gates_N = routing.token_ids_N, routing.weights_N
    if align == 'renormalize':
        # Gates that underflowed count alike.
        gates_N = gates_N + torch.finfo(gates_N.dtype).tiny
        served_N = gates_N.masked_fill(~routing.served_N, 0.)
        total_T = served_N.new_zeros(routing.num_tokens).index_add(
            0, token_ids_N, served_N)
        # A token without an expert has no row that counts.
        total_T = total_T.masked_fill(total_T == 0, 1.)
        gates_N = gates_N / total_T[token_ids_N]
    gates_P1 = gates_N[blocks.row_P][:, None]
    weighed_PD = y_PD * gates_P1.to(y_PD.dtype)
    if align != 'stopgrad':
        return weighed_PD
    kept_T = routing.kept_per_token().clamp_min(1)
    scale_P1 = 1 / kept_T[token_ids_N][blocks.row_P][:, None].to(y_PD.dtype)
    # The value of one, the gradient of the other.
    return weighed_PD + (scale_P1 * y_PD - weighed_PD).detach()


def apply_experts(x_JBD: Tensor, expert_J: Tensor | None, experts: Experts,
                  core: Core | None, middle: Callable[[Tensor], Tensor] |
                  None = None) -> Tensor:
    """(J, b, D), each block through its expert.

    Args:
        x_JBD: (J, b, D).
        expert_J: (J,) int64; None means that block e is expert e's.
        experts: as everywhere.
        core: the dense FFN they are residuals of.
        middle: applied to the (J, b, H) hidden blocks before the activation.
    """
    device = x_JBD.device.type
    if compat.is_autocast_enabled(device):
        x_JBD = x_JBD.to(compat.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        hidden_JBH = _linear(x_JBD, expert_J, experts, core, 'fc1')
        if middle is not None:
            hidden_JBH = middle(hidden_JBH)
        hidden_JBH = experts.dropout(experts.act(hidden_JBH))
        return _linear(hidden_JBH, expert_J, experts, core, 'fc2')


def _linear(x_JBI: Tensor, expert_J: Tensor | None, experts: Experts,
            core: Core | None, layer: str) -> Tensor:
    weight, bias = experts.stacked(layer, core)
    weight = weight.to(x_JBI.dtype)
    bias = None if bias is None else bias.to(x_JBI.dtype)
    if expert_J is not None:
        weight = weight.index_select(0, expert_J)
        bias = None if bias is None else bias.index_select(0, expert_J)
    y_JBO = torch.bmm(x_JBI, weight.mT)
    return y_JBO if bias is None else y_JBO + bias[:, None]


def _through_rows(blocks: Blocks, middle: Callable[[Tensor], Tensor],
                  hidden_JBH: Tensor) -> Tensor:
    """``middle`` takes rows, not blocks."""
    hidden_NH = middle(hidden_JBH.flatten(0, 1)[blocks.place_N])
    return hidden_NH[blocks.row_P].view_as(hidden_JBH)


def _rows_of_tokens(routing: StaticRouting) -> Tensor:
    """(T, K) int64, the rows of each token, that of its largest gate first;
    see :func:`rmoe.moe.dispatch.rows_of_tokens`."""
    token_ids_N = routing.token_ids_N
    num_rows = len(token_ids_N)
    row_N = torch.arange(num_rows, device=token_ids_N.device)
    # The row makes keys different: ONNX has no stable sort.
    table_TK = ((token_ids_N * num_rows + row_N).sort().values % num_rows
                ).view(routing.num_tokens, -1)
    # best first, of equal ones the lower row
    gates_TK = routing.weights_N.detach()[table_TK]
    best_TK = top_k(gates_TK, gates_TK.shape[1])
    return table_TK.gather(1, best_TK)
