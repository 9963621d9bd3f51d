"""Computes a MoE layer's output from its routing: dispatch, experts, combine.

``mix_sparse`` is for routers that choose experts or tokens, ``mix_soft`` for
soft routers. Axis letters as in routing.py.
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

# How gates weight the experts' outputs; the first is the default.
SPARSE_ALIGNMENTS = ('stopgrad', 'straight_through', 'none', 'renormalize')
# The alignments whose forward pass is the mean of a token's experts.
MEANS = ('stopgrad', 'straight_through')
SOFT_ALIGNMENTS = ('difference', 'none')
# A function of the (T, K) table of each token's rows, the row with the largest
# gate first, and of the (N, H) hidden rows. It returns hidden rows.
Middle = Callable[[Tensor, Tensor], Tensor]


def mix_sparse(x_TD: Tensor, routing: Routing, experts: Experts,
               core: Core | None, align: str, unrouted: str,
               middle: Middle | None = None) -> Tensor:
    """Apply the experts to their tokens and combine the results.

    Args:
        x_TD: (T, D) tokens.
        routing: which token goes to which expert, and its gate.
        experts: applied to the rows.
        core: the dense FFN that the experts are residuals of; None for plain
            experts.
        align: one of ``SPARSE_ALIGNMENTS``, see :class:`rmoe.moe.MoEFFN`.
        unrouted: what a token without a served row gets: 'core' or 'zero'.
        middle: called inside the experts before the activation; needs a
            routing that gives each token the same number of experts.

    Returns:
        (T, D), for each token the combination of its experts' outputs.
    """
    if host_may_read(x_TD):
        # On the CPU, reading the number of served rows costs nothing, while
        # computing unserved rows does.
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
        # The core runs before anything reads the experts' rows, because with
        # expert parallelism these may still be on their way from other
        # processes.
        fill_in = _serve_lonely(rows.lonely_T, x_TD, core)
    if len(rows_ND) < len(rows.token_ids_N):
        routing = routing.served(len(rows_ND))
        rows = routing.rows
    gates_N = _gates(routing, align)
    y_TD = rows_to_tokens(rows_ND, gates_N, align in MEANS, rows)
    return y_TD if fill_in is None else fill_in(y_TD)


def _autocast(x: Tensor) -> Tensor:
    """Cast to the autocast type, in which experts compute. Casting before the
    dispatch instead of after it moves fewer bytes."""
    device = x.device.type
    if compat.is_autocast_enabled(device):
        return x.to(compat.get_autocast_dtype(device))
    return x


def _gates(routing: Routing, align: str) -> Tensor:
    """(N,), the factor of each row according to ``align``; zero for unserved
    rows."""
    rows, gates_N = routing.rows, routing.weights_N
    if align == 'renormalize':
        # If all gates of a token have underflowed to zero, its experts count
        # equally and the division below is not 0 / 0.
        gates_N = gates_N + torch.finfo(gates_N.dtype).tiny
    elif align == 'straight_through':
        # The factor is 1 / n in value, so rows get the gradient of the mean.
        # Its gradient with respect to the gate is 1, so gates get the
        # gradient of the gated sum.
        share_T = 1. / rows.kept_per_token()
        share_N = share_T.to(gates_N).index_select(0, rows.token_ids_N)
        gates_N = share_N + (gates_N - gates_N.detach())
    if rows.unserved_N is not None:
        gates_N = gates_N.masked_fill(rows.unserved_N, 0.)
    if align == 'renormalize':
        total_T1 = rows_to_tokens(gates_N[:, None], torch.ones_like(gates_N),
                                  False, rows)
        # A token without a served row has a total of zero, and its unserved
        # rows have gates of zero. A total of 1 avoids 0 / 0.
        if rows.lonely_T is not None:
            total_T1 = total_T1.masked_fill(rows.lonely_T[:, None], 1.)
        gates_N = gates_N / tokens_to_rows(total_T1, rows)[:, 0]
    return gates_N


def _serve_lonely(lonely_T: Tensor, x_TD: Tensor, core: Core
                  ) -> Callable[[Tensor], Tensor] | None:
    """Apply the core to the tokens without a served row.

    Returns:
        A function that puts the results into the (T, D) output; None if there
        is no such token.
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
    """(T, K) int64, the rows of each token by falling gate, so that what is
    computed from them does not depend on the order of the experts."""
    rows = routing.rows
    if rows.by_token is None:
        place_N = torch.arange(rows.num_tokens, device=rows.token_ids_N.device)
        return torch.zeros_like(place_N).scatter(
            0, rows.token_ids_N, place_N)[:, None]
    assert rows.unserved_N is None
    table_TK = rows.by_token[0].view(rows.num_tokens, -1)
    # Of equal gates, the lower expert index comes first.
    gates_TK = routing.weights_N.detach()[table_TK]
    return table_TK.gather(1, top_k(gates_TK, gates_TK.shape[1]))


def mix_soft(x_TD: Tensor, routing: SoftRouting, experts: Experts,
             core: Core | None, align: str) -> Tensor:
    """Mix tokens into slots, apply the experts, and mix slots into tokens.

    Args:
        x_TD: (T, D) tokens.
        routing: the weights of tokens in slots, and of slots in tokens.
        experts: applied to the slots.
        core: the dense FFN that the experts are residuals of; None for plain
            experts.
        align: one of ``SOFT_ALIGNMENTS``, see :class:`rmoe.moe.MoEFFN`.

    Returns:
        (T, D), each token's mixture of the slots' outputs.
    """
    mixed_TD = x_TD
    if routing.valid_T is not None:
        # Padded tokens have a weight of zero, which does not keep out their
        # values: 0 * nan is nan.
        mixed_TD = x_TD.masked_fill(~routing.valid_T[:, None], 0.)
    dispatch_GSN = routing.dispatch_GSN.to(x_TD.dtype)
    slots_GND = dispatch_GSN.mT @ mixed_TD.unflatten(
        0, dispatch_GSN.shape[:2])
    # Experts take rows sorted by expert: (G, E, C, D) becomes (E, G, C, D).
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
