"""From a routing to the layer's output: dispatch, experts, combine.

Axis letters as in routing.py.
"""
from functools import partial

import torch
from torch import Tensor

from rmoe import compat
from rmoe.moe import static
from rmoe.moe.dispatch import Combine, Dispatch, rows_of_tokens
from rmoe.moe.experts import Core, Experts
from rmoe.moe.routing import Routing, SoftRouting, StaticRouting

# How gates meet outputs; the first is the default.
SPARSE_ALIGNMENTS = ('stopgrad', 'none', 'renormalize')
SOFT_ALIGNMENTS = ('difference', 'none')


def mix_sparse(x_TD: Tensor, routing: Routing, experts: Experts,
               core: Core | None, align: str, unrouted: str,
               middle: static.Middle | None = None) -> Tensor:
    """(T, D), each token's experts summed.

    Args:
        x_TD: (T, D) tokens.
        routing: rows of tokens at experts.
        experts: what is applied to the rows.
        core: the dense FFN they are residuals of.
        align: one of ``SPARSE_ALIGNMENTS``, see :class:`rmoe.moe.MoEFFN`.
        unrouted: 'core' or 'zero', for tokens without a row.
        middle: called inside the experts before the activation, with the
            table (T, K) of each token's rows, that of its largest gate
            first, and the (N, H) hidden rows.
    """
    if isinstance(routing, StaticRouting):
        return static.mix_sparse(x_TD, routing, experts, core, align,
                                 unrouted, middle)
    token_ids_N = routing.token_ids_N
    table_TK = rows_of_tokens(token_ids_N, len(x_TD))
    rows_ND = Dispatch.apply(x_TD, token_ids_N, table_TK)
    if middle is not None:
        # Best first: what follows must not depend on the experts' numbers.
        order_TK = routing.weights_N.detach()[table_TK].sort(
            dim=1, descending=True, stable=True).indices
        middle = partial(middle, table_TK.gather(1, order_TK))
    rows_ND = experts(rows_ND, routing.counts_E, core, middle)
    kept_T = None
    if table_TK.numel() != len(token_ids_N) or not len(token_ids_N):
        kept_T = routing.kept_per_token()
    gates_N, scale_N = _gates(routing, align, table_TK, kept_T)
    y_TD = Combine.apply(rows_ND, gates_N, scale_N, token_ids_N, table_TK)
    if kept_T is not None and unrouted == 'core':
        assert core is not None
        lonely = torch.nonzero(kept_T == 0).flatten()
        y_TD = y_TD.index_copy(
            0, lonely, core(x_TD.index_select(0, lonely)).to(y_TD.dtype))
    return y_TD


def _gates(routing: Routing, align: str, table_TK: Tensor,
           kept_T: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What rows are multiplied by in backward and in forward."""
    weights_N, token_ids_N = routing.weights_N, routing.token_ids_N
    if align == 'stopgrad':
        if kept_T is not None:
            return weights_N, 1 / kept_T[token_ids_N].to(weights_N.dtype)
        # Every token was kept equally often.
        most = table_TK.shape[1]
        return weights_N, None if most == 1 else torch.full_like(
            weights_N, 1 / most)
    if align == 'renormalize':
        # Gates that underflowed count alike.
        weights_N = weights_N + torch.finfo(weights_N.dtype).tiny
        total_T1 = Combine.apply(weights_N[:, None],
                                 torch.ones_like(weights_N), None,
                                 token_ids_N, table_TK)
        weights_N = weights_N / Dispatch.apply(total_T1, token_ids_N,
                                               table_TK)[:, 0]
    return weights_N, weights_N.detach()


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
    if compat.is_compiling():
        out_ND = static.apply_experts(rows_EGCD.flatten(1, 2), None, experts,
                                      core).flatten(0, 1)
    else:
        out_ND = experts(rows_ND, routing.counts_E, core)
    if align == 'difference':
        assert core is not None
        out_ND = out_ND - core(rows_ND)
    out_GND = out_ND.reshape(rows_EGCD.shape).transpose(0, 1).flatten(1, 2)
    y_TD = (routing.combine_GSN.to(out_GND.dtype) @ out_GND).flatten(0, 1)
    if align == 'difference':
        assert core is not None
        y_TD = y_TD + core(x_TD)
    return y_TD
