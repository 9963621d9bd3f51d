"""From a routing to the layer's output: dispatch, experts, combine.

Axis letters as in routing.py.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rmoe import compat
from rmoe.moe.assignment import top_k
from rmoe.moe.dispatch import rows_to_tokens, tokens_to_rows
from rmoe.moe.experts import Core, Experts
from rmoe.moe.host import host_may_read
from rmoe.moe.routing import Routing, SoftRouting

# How gates meet outputs; the first is the default.
SPARSE_ALIGNMENTS = ('stopgrad', 'straight_through', 'none', 'renormalize')
# Those whose outputs are means in forward.
MEANS = ('stopgrad', 'straight_through')
SOFT_ALIGNMENTS = ('difference', 'none')
# The table (T, K) of each token's rows, that of its largest gate first, and
# the (N, H) hidden rows.
Middle = Callable[[Tensor, Tensor], Tensor]


def mix_sparse(x_TD: Tensor, routing: Routing, experts: Experts,
               core: Core | None, align: str, unrouted: str,
               middle: Middle | None = None) -> Tensor:
    """(T, D), each token's experts summed.

    Args:
        x_TD: (T, D) tokens.
        routing: rows of tokens at experts.
        experts: what is applied to the rows.
        core: the dense FFN they are residuals of.
        align: one of ``SPARSE_ALIGNMENTS``, see :class:`rmoe.moe.MoEFFN`.
        unrouted: 'core' or 'zero', for tokens without a row.
        middle: called inside the experts before the activation; needs a
            routing that serves each token equally often.
    """
    if host_may_read(x_TD):
        # Where to look is free, work on rows that nobody serves is not.
        routing = routing.served()
    rows = routing.rows
    x_TD = _autocast(x_TD)
    hidden = None
    if middle is not None:
        hidden = partial(middle, _best_first(routing))
    rows_ND = experts(tokens_to_rows(x_TD, rows), rows, core, hidden)
    fill_in = None
    if unrouted == 'core' and rows.lonely_T is not None:
        assert core is not None
        # Before anything reads the experts' rows, which may still be on their
        # way from other processes.
        fill_in = _serve_lonely(rows.lonely_T, x_TD, core)
    if len(rows_ND) < len(rows.token_ids_N):
        routing = routing.served(len(rows_ND))
        rows = routing.rows
    gates_N = _gates(routing, align)
    y_TD = rows_to_tokens(rows_ND, gates_N, align in MEANS, rows)
    return y_TD if fill_in is None else fill_in(y_TD)


def _autocast(x: Tensor) -> Tensor:
    """In the type that experts get: fewer bytes are moved."""
    device = x.device.type
    if compat.is_autocast_enabled(device):
        return x.to(compat.get_autocast_dtype(device))
    return x


def _gates(routing: Routing, align: str) -> Tensor:
    """(N,) what rows are multiplied by, zeros where nobody serves them."""
    rows, gates_N = routing.rows, routing.weights_N
    if align == 'renormalize':
        # Gates that underflowed count alike.
        gates_N = gates_N + torch.finfo(gates_N.dtype).tiny
    if rows.unserved_N is not None:
        gates_N = gates_N.masked_fill(rows.unserved_N, 0.)
    if align == 'renormalize':
        total_T1 = rows_to_tokens(gates_N[:, None], torch.ones_like(gates_N),
                                  False, rows)
        # A token without a row has none that counts.
        if rows.lonely_T is not None:
            total_T1 = total_T1.masked_fill(rows.lonely_T[:, None], 1.)
        gates_N = gates_N / tokens_to_rows(total_T1, rows)[:, 0]
    if align == 'straight_through':
        # Rows get the gradient of the mean, gates that of the gated sum.
        share_T = 1. / rows.kept_per_token().clamp_min(1)
        share_N = share_T.to(gates_N).index_select(0, rows.token_ids_N)
        if rows.unserved_N is not None:
            share_N = share_N.masked_fill(rows.unserved_N, 0.)
        gates_N = share_N + (gates_N - gates_N.detach())
    return gates_N


def _serve_lonely(lonely_T: Tensor, x_TD: Tensor, core: Core
                  ) -> Callable[[Tensor], Tensor] | None:
    """Apply the core to the tokens without a row.

    Returns:
        What puts its results into (T, D); None where there is no such token.
    """
    if not host_may_read(x_TD):
        core_TD = core(x_TD)
        return lambda y_TD: torch.where(
            lonely_T[:, None], core_TD.to(y_TD.dtype), y_TD)
    lonely = torch.nonzero(lonely_T).flatten()
    if not len(lonely):
        return None
    core_LD = core(x_TD.index_select(0, lonely))
    return lambda y_TD: y_TD.index_copy(0, lonely, core_LD.to(y_TD.dtype))


def _best_first(routing: Routing) -> Tensor:
    """(T, K) int64, the rows of each token by falling gate: what follows must
    not depend on the experts' numbers."""
    rows = routing.rows
    if rows.by_token is None:
        place_N = torch.arange(rows.num_tokens, device=rows.token_ids_N.device)
        return torch.zeros_like(place_N).scatter(
            0, rows.token_ids_N, place_N)[:, None]
    assert rows.unserved_N is None
    table_TK = rows.by_token[0].view(rows.num_tokens, -1)
    # Best first, of equal ones the lower expert.
    gates_TK = routing.weights_N.detach()[table_TK]
    return table_TK.gather(1, top_k(gates_TK, gates_TK.shape[1]))


def mix_soft(x_TD: Tensor, routing: SoftRouting, experts: Experts,
             core: Core | None, align: str) -> Tensor:
    """(T, D), each token's mixture of the slots' outputs.

    Args:
        x_TD: (T, D) tokens.
        routing: mixtures of tokens into slots, of slots into tokens.
        experts: what is applied to the slots.
        core: the dense FFN they are residuals of.
        align: one of ``SOFT_ALIGNMENTS``, see :class:`rmoe.moe.MoEFFN`.
    """
    mixed_TD = x_TD
    if routing.valid_T is not None:
        # Padding has no weight, which is not enough: 0 * nan is nan.
        mixed_TD = x_TD.masked_fill(~routing.valid_T[:, None], 0.)
    dispatch_GSN = routing.dispatch_GSN.to(x_TD.dtype)
    slots_GND = dispatch_GSN.mT @ mixed_TD.unflatten(
        0, dispatch_GSN.shape[:2])
    # Rows sorted by expert: (G, E, C, D) to (E, G, C, D).
    rows_EGCD = slots_GND.unflatten(
        1, (experts.num_experts, -1)).transpose(0, 1)
    rows_ND = rows_EGCD.flatten(0, 2)
    out_ND = experts(rows_ND, None, core)
    if align == 'difference':
        assert core is not None
        out_ND = out_ND - core(rows_ND)
    out_GND = out_ND.reshape(rows_EGCD.shape).transpose(0, 1).flatten(1, 2)
    y_TD = (routing.combine_GSN.to(out_GND.dtype) @ out_GND).flatten(0, 1)
    if align == 'difference':
        assert core is not None
        y_TD = y_TD + core(x_TD)
    return y_TD
