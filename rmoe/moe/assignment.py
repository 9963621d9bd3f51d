"""Assignment of tokens to experts: pure functions on a score matrix.

Routers call :func:`choose_experts` (token choice) or :func:`choose_tokens`
(expert choice). Shapes depend on sizes and options, never on scores, and no
function reads a value of a tensor. Ties go to the lower expert index and to
the lower token index, on every device; torch.topk alone does not promise
that. Axis letters as in routing.py.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe.moe.rows import (
    Rows,
    by_falling,
    kept_per_token,
    order_by_token,
    stable_sort,
    starts_of,
)

PRIORITIES = ('first_come', 'bpr', 'bpr_sum')
# Slots per expert in each group: one number for all groups, or (G,) int64.
Capacity = int | Tensor


def choose_experts(scores_TE: Tensor, expert_ids_TK: Tensor,
                   valid_T: Tensor | None = None,
                   capacity: Capacity | None = None, most: int = 0,
                   num_groups: int = 1, priority: str = 'first_come'
                   ) -> tuple[Rows, Tensor]:
    """Token choice: each token goes to the k experts it has chosen.

    Args:
        scores_TE: (T, E) scores by which experts were chosen.
        expert_ids_TK: (T, K) the chosen experts, see :func:`top_k`.
        valid_T: (T,) bool, False for padding; None means all are valid.
        capacity: slots per expert in each group of T / G consecutive tokens;
            None drops nothing.
        most: an upper bound of ``capacity`` that is known without reading a
            tensor.
        num_groups: G.
        priority: which tokens get the slots, see :func:`fill_order`.

    Returns:
        The rows; and (N,) int64, for each row its index among the T * K
        flattened (token, choice) pairs.
    """
    num_tokens, num_experts = scores_TE.shape
    num_pairs, k = expert_ids_TK.numel(), expert_ids_TK.shape[1]
    num_groups = 1 if capacity is None else num_groups
    num_keys = num_experts * num_groups
    keys_N = _keys(expert_ids_TK, valid_T, num_groups, num_keys)
    fill_N = None
    if capacity is not None:
        fill_N = fill_order(scores_TE, expert_ids_TK, priority)
        keys_N = keys_N if fill_N is None else keys_N[fill_N]
    keys_N, pairs_N = stable_sort(keys_N, num_keys + 1)
    starts = starts_of(keys_N, num_keys + 1)
    counts = demand = starts[1:] - starts[:-1]
    ends, max_rows = starts[1:], num_pairs
    if capacity is not None:
        keys_N, again_N = _put_back(keys_N, starts, capacity, num_keys)
        pairs_N = pairs_N[again_N]
        pairs_N = pairs_N if fill_N is None else fill_N[pairs_N]
        counts = _at_most(demand, capacity, num_experts)
        if num_groups > 1:
            keys_N = keys_N.div(num_groups, rounding_mode='floor')
            counts, demand = torch.stack([counts, demand]).view(
                2, num_experts, -1).sum(2, dtype=torch.int32)
        ends = counts.cumsum(0, dtype=torch.int32)
        max_rows = min(num_pairs, num_groups * most)
        # No more rows can be served than there are slots, so the others are
        # cut off.
        size = min(num_pairs, num_experts * max_rows)
        keys_N, pairs_N = keys_N[:size], pairs_N[:size]
    unserved_N = None
    if valid_T is not None or capacity is not None:
        unserved_N = keys_N >= num_experts
        keys_N = keys_N.clamp_max(num_experts - 1)
    token_ids_N = pairs_N if k == 1 else pairs_N.div(k, rounding_mode='floor')
    return _rows(token_ids_N, keys_N, counts, ends, demand, num_tokens,
                 max_rows, unserved_N, each=k), pairs_N


def _rows(token_ids_N: Tensor, expert_ids_N: Tensor, counts_E: Tensor,
          ends_E: Tensor, demand_E: Tensor, num_tokens: int, max_rows: int,
          unserved_N: Tensor | None, each: int | None) -> Rows:
    """Build :class:`Rows` and find in them the rows of each token.

    Args:
        token_ids_N: see :class:`Rows`, like all that are not listed here.
        each: rows of each token if all rows are served; None if tokens may
            have any number.
    """
    by_token = lonely_T = None
    if each != 1 or unserved_N is not None:
        by_token = order_by_token(token_ids_N, num_tokens, unserved_N)
    if by_token is not None and (each is None or unserved_N is not None):
        lonely_T = kept_per_token(by_token[1], num_tokens) == 0
    return Rows(token_ids_N, expert_ids_N, counts_E, ends_E, demand_E,
                num_tokens, max_rows, unserved_N, by_token, lonely_T)


def _keys(expert_ids_TK: Tensor, valid_T: Tensor | None, num_groups: int,
          num_keys: int) -> Tensor:
    """(T*K,) int64, the key expert * G + group of each (token, choice) pair,
    which stands for the slots that the pair competes for; ``num_keys`` for
    padding."""
    keys_TK = expert_ids_TK
    if num_groups > 1:
        group_G = torch.arange(num_groups, device=keys_TK.device)
        keys_TK = torch.add(group_G[:, None], keys_TK.view(num_groups, -1),
                            alpha=num_groups).view_as(keys_TK)
    if valid_T is not None:
        keys_TK = keys_TK.masked_fill(~valid_T[:, None], num_keys)
    return keys_TK.flatten()


def _at_most(demand: Tensor, capacity: Capacity, num_experts: int) -> Tensor:
    """(num_keys,), the number of rows of each key that get a slot."""
    if isinstance(capacity, int):
        return demand.clamp_max(capacity)
    return torch.minimum(demand, capacity.to(demand.dtype).repeat(num_experts))


def _put_back(keys_N: Tensor, starts: Tensor, capacity: Capacity,
              num_keys: int) -> tuple[Tensor, Tensor]:
    """Sort again, so that rows over the capacity come last.

    Args:
        keys_N: (N,) sorted keys; rows of one key by falling priority.
        starts: (num_keys + 1,) where each key begins.
        capacity: slots of each key.
        num_keys: number of keys; rows that get no slot receive it as their
            key.

    Returns:
        As :func:`stable_sort`.
    """
    place_N = torch.arange(len(keys_N), dtype=starts.dtype,
                           device=keys_N.device)
    if isinstance(capacity, int):
        over_N = place_N - starts.index_select(0, keys_N) >= capacity
    else:
        slots = F.pad(capacity.to(starts.dtype).repeat(
            num_keys // len(capacity)), (0, 1))
        over_N = place_N >= (starts + slots).index_select(0, keys_N)
    return stable_sort(keys_N.masked_fill(over_N, num_keys), num_keys + 1)


def choose_tokens(scores_GSE: Tensor, capacity: Capacity, most: int,
                  allowed_GSE: Tensor | None = None) -> tuple[Rows, Tensor]:
    """Expert choice: in each group, each expert takes its C best tokens.

    Args:
        scores_GSE: (G, S, E) scores by which experts choose tokens.
        capacity: C of each group, at most S.
        most: an upper bound of ``capacity`` that is known without reading a
            tensor; N is E * G * most.
        allowed_GSE: bool, broadcastable to the scores; False where an expert
            must not take a token. An expert with fewer than C allowed tokens
            takes them all.

    Returns:
        The rows; and (N,) int64, for each row its index among the E * T
        flattened (expert, token) pairs.
    """
    groups, tokens, num_experts = scores_GSE.shape
    num_tokens, num_rows = groups * tokens, num_experts * groups * most
    # The token axis, which is long, comes last, so that ranking runs over
    # contiguous memory.
    scores_EGS = scores_GSE.detach().permute(2, 0, 1).contiguous()
    if allowed_GSE is None:
        taken_EGS = largest(scores_EGS, capacity, most)
    else:
        allowed_EGS = allowed_GSE.permute(2, 0, 1)
        taken_EGS = allowed_EGS & largest(
            scores_EGS.masked_fill(~allowed_EGS, -float('inf')), capacity,
            most)
    pairs_N = _places_of(taken_EGS.flatten(), num_rows)
    token_ids_N = pairs_N % max(num_tokens, 1)
    expert_ids_N = pairs_N.div(max(num_tokens, 1), rounding_mode='floor')
    counts = taken_EGS.sum((1, 2), dtype=torch.int32)
    ends = counts.cumsum(0, dtype=torch.int32)
    unserved_N = None
    if allowed_GSE is not None or isinstance(capacity, Tensor):
        unserved_N = torch.arange(num_rows, device=ends.device) >= ends[-1]
    return _rows(token_ids_N, expert_ids_N, counts, ends, counts,
                 num_tokens, groups * most, unserved_N, each=None), pairs_N


def _places_of(taken_M: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) int64, the positions of True values; zeros behind the
    last of them."""
    # All positions that are not taken are written to one extra place, which
    # is then cut off.
    place_M = (taken_M.cumsum(0) - 1).masked_fill(~taken_M, num_rows)
    return place_M.new_zeros(num_rows + 1).scatter_(
        0, place_M, torch.arange(len(place_M), device=place_M.device)
    )[:num_rows]


def largest(values: Tensor, count: Capacity, most: int) -> Tensor:
    """(..., S) bool, True for the ``count`` largest values of the last axis;
    of equal values the first are taken.

    Args:
        values: (..., S).
        count: how many to take, at most S: a number, or int64 broadcastable
            to (...).
        most: an upper bound of ``count``, at most S.
    """
    if isinstance(count, int):
        most = count
    if not most or not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    if isinstance(count, int):
        last = values.topk(count, sorted=False).values.amin(-1, keepdim=True)
    else:
        count = count.expand(values.shape[:-1])[..., None]
        last = values.topk(most).values.gather(-1, (count - 1).clamp_min(0))
        # Where the count is zero, no value may reach the threshold.
        last = last.masked_fill(count < 1, float('inf'))
    # ``last`` is the smallest value to take. All values above it are taken.
    # Of the values equal to it the first are taken, until the count is
    # reached; topk alone could take any of them.
    above, equal = values > last, values == last
    missing = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    first = equal.cumsum(-1, dtype=torch.int32) <= missing
    return above | (equal & first)


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """(T, K) int64, the k best experts of each token, best first."""
    # argmax returns the first of equal maxima, which is the tie rule wanted
    # here, and k passes over few experts are cheaper than a stable sort.
    remaining_TE = scores_TE.detach()
    chosen = [remaining_TE.argmax(1)]
    for _ in range(k - 1):
        remaining_TE = remaining_TE.scatter(1, chosen[-1][:, None],
                                            -float('inf'))
        chosen.append(remaining_TE.argmax(1))
    return chosen[0][:, None] if k == 1 else torch.stack(chosen, 1)


def choose(scores_TE: Tensor, gates_TE: Tensor, k: int
           ) -> tuple[Tensor, Tensor]:
    """Choose the k best experts of each token.

    Args:
        scores_TE: (T, E) scores by which experts are chosen.
        gates_TE: (T, E) gates, differentiable.
        k: experts per token.

    Returns:
        (T, K) int64, the chosen experts, best first; and (T, K), their gates.
    """
    if k == 1 and scores_TE is gates_TE:
        gates_T1, ids_T1 = gates_TE.max(1, keepdim=True)
        return ids_T1, gates_T1
    ids_TK = top_k(scores_TE, k)
    return ids_TK, gates_TE.gather(1, ids_TK)


def fill_order(scores_TE: Tensor, expert_ids_TK: Tensor,
               priority: str) -> Tensor | None:
    """(T*K,) int64, the flattened (token, choice) pairs in the order in which
    they are given slots; None if that is the order they are in.

    All first choices precede all second choices. Within one choice, tokens
    come in the order of their positions ('first_come'), or by falling
    priority (Batch Prioritized Routing, 2106.05974, 4.1). The priority is the
    token's largest score ('bpr') or the sum of its chosen scores ('bpr_sum');
    ties go to the lower position.
    """
    num_tokens, k = expert_ids_TK.shape
    if priority == 'first_come':
        if k == 1:
            return None
        tokens_T = torch.arange(num_tokens, device=expert_ids_TK.device)
    else:
        chosen_TK = scores_TE.detach().gather(
            1, expert_ids_TK[:, :1] if priority == 'bpr' else expert_ids_TK)
        tokens_T = by_falling(chosen_TK[:, 0] if chosen_TK.shape[1] == 1
                              else chosen_TK.sum(1))
    if k == 1:
        return tokens_T
    choices_K1 = torch.arange(k, device=tokens_T.device)[:, None]
    return (tokens_T * k + choices_K1).flatten()
