"""Who goes where, in shapes that depend on no decision: for tracing.

torch.compile, torch.export and ONNX fix the shape of every tensor before the
first token is seen. What :mod:`rmoe.moe.assignment` cuts off is kept here,
behind the rows of the last expert. Decisions are the same, by counting in
place of sorting. Axis letters as in routing.py; M = S * K.
"""
import torch
from torch import Tensor

from rmoe.moe.rows import StaticRows


def choose_experts(expert_ids_TK: Tensor, num_experts: int,
                   valid_T: Tensor | None, capacity_G: Tensor | None,
                   most: int | None, priority_T: Tensor | None
                   ) -> StaticRows:
    """See :func:`rmoe.moe.assignment.choose_experts`; N = T * K.

    Args:
        expert_ids_TK: (T, K) the experts of each token, best first.
        num_experts: E.
        valid_T: (T,) bool.
        capacity_G: (G,) int64 slots per expert in each group.
        most: no group has more slots.
        priority_T: (T,) by what tokens get slots; None means by position.
    """
    k = expert_ids_TK.shape[1]
    groups = 1 if capacity_G is None else len(capacity_G)
    pairs_GM = _fill_order(expert_ids_TK, priority_T, groups)
    expert_ids_GM = expert_ids_TK.flatten()[pairs_GM]
    asks_GME = expert_ids_GM[..., None] == torch.arange(
        num_experts, device=expert_ids_TK.device)
    if valid_T is not None:
        asks_GME = asks_GME & valid_T[pairs_GM // k][..., None]
    demand_GE = asks_GME.sum(1)
    # How many rows of the same expert come before, in the group.
    rank_GM = _of_own(asks_GME.cumsum(1, dtype=torch.int32),
                      expert_ids_GM).long() - 1
    counts_GE, served_GM = demand_GE, asks_GME.any(2)
    if capacity_G is not None:
        counts_GE = torch.minimum(demand_GE, capacity_G[:, None])
        served_GM = served_GM & (rank_GM < capacity_G[:, None])
    # Expert after expert, and group after group inside.
    ends_EG = counts_GE.t().flatten().cumsum(0).view(num_experts, groups)
    starts_GE = ends_EG.t() - counts_GE
    starts_GM = starts_GE.gather(1, expert_ids_GM)
    spare_GM = (~served_GM).flatten().cumsum(0).view_as(rank_GM) - 1
    place_N = torch.where(served_GM, starts_GM + rank_GM,
                          counts_GE.sum() + spare_GM).flatten()
    order_N = torch.zeros_like(place_N).scatter(0, place_N,
                                                pairs_GM.flatten())
    num_rows = len(order_N)
    return StaticRows(
        token_ids_N=order_N // k,
        expert_ids_N=expert_ids_TK.flatten()[order_N],
        counts_E=counts_GE.sum(0),
        demand_E=demand_GE.sum(0),
        max_rows=num_rows if most is None else min(num_rows, groups * most),
        complete=valid_T is None and capacity_G is None)


def choose_tokens(scores_GSE: Tensor, capacity_G: Tensor,
                  allowed_GSE: Tensor | None, most: int) -> StaticRows:
    """See :func:`rmoe.moe.assignment.choose_tokens`; N = E * G * most.

    Args:
        scores_GSE: (G, S, E).
        capacity_G: (G,) int64.
        allowed_GSE: bool, broadcastable to the scores.
        most: no group has more slots; at most S.
    """
    groups, tokens, num_experts = scores_GSE.shape
    num_tokens, num_rows = groups * tokens, num_experts * groups * most
    scores_EGS = scores_GSE.detach().permute(2, 0, 1)
    if allowed_GSE is None:
        taken_EGS = _largest(scores_EGS, capacity_G)
    else:
        allowed_EGS = allowed_GSE.permute(2, 0, 1)
        taken_EGS = allowed_EGS & _largest(
            scores_EGS.masked_fill(~allowed_EGS, -float('inf')), capacity_G)
    taken_M = taken_EGS.flatten()
    # Those not taken meet in a place that is cut off.
    place_M = torch.where(taken_M, taken_M.cumsum(0) - 1, num_rows)
    pair_N = place_M.new_zeros(num_rows + 1).scatter(
        0, place_M, torch.arange(len(place_M), device=place_M.device)
    )[:num_rows]
    counts_E = taken_EGS.sum((1, 2))
    return StaticRows(pair_N % num_tokens, pair_N // num_tokens, counts_E,
                      counts_E, max_rows=groups * most, complete=False)


def _fill_order(expert_ids_TK: Tensor, priority_T: Tensor | None,
                groups: int) -> Tensor:
    """(G, M) int64, flat (token, choice) pairs of each group in the order
    slots are given; see :func:`rmoe.moe.assignment.fill_order`."""
    num_tokens, k = expert_ids_TK.shape
    tokens_GS = torch.arange(
        num_tokens, device=expert_ids_TK.device).view(groups, -1)
    if priority_T is not None:
        tokens_GS = tokens_GS.gather(
            1, _by_falling(priority_T.view(groups, -1)))
    choices_K1 = torch.arange(k, device=tokens_GS.device)[:, None]
    return (tokens_GS[:, None] * k + choices_K1).flatten(1)


def _by_falling(values_GS: Tensor) -> Tensor:
    """(G, S) int64, positions by falling value, ties by position.

    ONNX has no stable sort. So equal values, neighbours after a first sort,
    get one number, and a second sort has no ties.
    """
    values_GS, order_GS = values_GS.sort(1, descending=True)
    step_GS = (values_GS[:, 1:] != values_GS[:, :-1]).long().cumsum(1)
    step_GS = torch.cat([torch.zeros_like(order_GS[:, :1]), step_GS], 1)
    tokens = order_GS.shape[1]
    return (step_GS * tokens + order_GS).sort(1).values % tokens


def _largest(values_EGS: Tensor, count_G: Tensor) -> Tensor:
    """(E, G, S) bool, the ``count`` largest of the last axis, of equal ones
    the first; see :func:`rmoe.moe.assignment.largest`."""
    tokens = values_EGS.shape[2]
    place_EG1 = (count_G - 1).clamp(0, tokens - 1).expand(
        values_EGS.shape[:2])[..., None]
    last = values_EGS.sort(2, descending=True).values.gather(2, place_EG1)
    above, equal = values_EGS > last, values_EGS == last
    missing = count_G[:, None] - above.sum(2, keepdim=True)
    return above | (equal & (equal.cumsum(2) <= missing))


def _of_own(values_GME: Tensor, expert_ids_GM: Tensor) -> Tensor:
    """(G, M), of each row the value of its expert."""
    return values_GME.gather(2, expert_ids_GM[..., None])[..., 0]
