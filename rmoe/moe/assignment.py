"""Who goes where: pure functions on a score matrix.

Axis letters as in routing.py. Ties go to the lower expert index and to the
lower token index, on every device; torch.topk promises no order.
"""
import torch
from torch import Tensor

from rmoe import compat
from rmoe.moe import static_rows
from rmoe.moe.rows import Rows


def choose_experts(scores_TE: Tensor, k: int,
                   valid_T: Tensor | None = None,
                   capacity_G: Tensor | None = None,
                   priority: str = 'first_come',
                   most: int | None = None) -> Rows:
    """Token choice: each token takes its k best experts.

    Args:
        scores_TE: (T, E) what experts are chosen by.
        k: K.
        valid_T: (T,) bool, False for padding; None means all are valid.
        capacity_G: (G,) int64 slots per expert in each group, of T / G
            tokens in order; None drops nothing.
        priority: who gets the slots, see :func:`fill_order`.
        most: a bound of ``capacity_G``, for tracing.
    """
    num_experts = scores_TE.shape[1]
    expert_ids_TK = top_k(scores_TE, k)
    if compat.is_compiling():
        return static_rows.choose_experts(
            expert_ids_TK, num_experts, valid_T, capacity_G, most,
            _priorities(scores_TE, expert_ids_TK, priority))
    keys_TK = expert_ids_TK
    num_groups = 1 if capacity_G is None else len(capacity_G)
    if num_groups > 1:
        # Every (expert, group) pair fills its own slots.
        group_T = torch.arange(num_groups, device=keys_TK.device
                               ).repeat_interleave(len(keys_TK) // num_groups)
        keys_TK = keys_TK * num_groups + group_T[:, None]
    if valid_T is not None:
        keys_TK = keys_TK.masked_fill(~valid_T[:, None],
                                      num_experts * num_groups)
    if capacity_G is None:
        order_N, counts = group_by_key(keys_TK.flatten(), num_experts)
        demand = counts
    else:
        fill_N = fill_order(scores_TE, expert_ids_TK, priority)
        grouped_N, demand = group_by_key(keys_TK.flatten()[fill_N],
                                         num_experts * num_groups)
        kept_N, counts = limit_to_capacity(grouped_N, demand,
                                           capacity_G.repeat(num_experts))
        order_N = fill_N[kept_N]
    return Rows(
        token_ids_N=order_N.div(k, rounding_mode='floor'),
        expert_ids_N=expert_ids_TK.flatten()[order_N],
        counts_E=counts.view(num_experts, -1).sum(1),
        demand_E=demand.view(num_experts, -1).sum(1))


def choose_tokens(scores_GSE: Tensor, capacity_G: Tensor,
                  allowed_GSE: Tensor | None = None,
                  most: int | None = None) -> Rows:
    """Expert choice: in each group, each expert takes its C best tokens.

    Args:
        scores_GSE: (G, S, E) what tokens are chosen by.
        capacity_G: (G,) int64, C of each group, at most S.
        allowed_GSE: bool, broadcastable to the scores; False where an expert
            must not take a token. An expert with fewer than C tokens allowed
            takes them all.
        most: a bound of ``capacity_G``, for tracing; None means S.
    """
    if compat.is_compiling():
        return static_rows.choose_tokens(scores_GSE, capacity_G, allowed_GSE,
                                         most or scores_GSE.shape[1])
    groups, tokens, num_experts = scores_GSE.shape
    # The long axis last: ranking runs over contiguous memory.
    scores_EGS = scores_GSE.detach().permute(2, 0, 1).contiguous()
    if allowed_GSE is None:
        taken_EGS = largest(scores_EGS, capacity_G)
    else:
        allowed_EGS = allowed_GSE.permute(2, 0, 1)
        taken_EGS = allowed_EGS & largest(
            scores_EGS.masked_fill(~allowed_EGS, -float('inf')), capacity_G)
    expert_ids_N, token_ids_N = taken_EGS.reshape(
        num_experts, groups * tokens).nonzero(as_tuple=True)
    counts_E = taken_EGS.sum((1, 2))
    return Rows(token_ids_N, expert_ids_N, counts_E, counts_E)


def largest(values: Tensor, count: Tensor) -> Tensor:
    """(..., S) bool, the ``count`` largest of the last axis.

    Args:
        values: (..., S).
        count: int64, how many, at most S; broadcastable to (...).
    """
    most = int(count.max())
    if not most or not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    count = count.expand(values.shape[:-1])[..., None]
    if int(count.min()) == most:
        last = values.topk(most, sorted=False).values.amin(-1, keepdim=True)
    else:
        last = values.topk(most).values.gather(-1, (count - 1).clamp_min(0))
    # All above the last are taken; of those equal to it the first, as many
    # as are missing: topk alone would take any.
    above, equal = values > last, values == last
    missing = count - above.sum(-1, keepdim=True)
    if bool((equal.sum(-1, keepdim=True) > missing).any()):
        equal &= equal.cumsum(-1, dtype=torch.int32) <= missing
    return (above | equal) & (count > 0)


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """(T, K) int64, the k best experts of each token, best first."""
    # argmax returns the first maximum, and k passes over a small E are
    # cheaper than a stable sort.
    remaining_TE = scores_TE.detach()
    chosen = [remaining_TE.argmax(1)]
    for _ in range(k - 1):
        remaining_TE = remaining_TE.scatter(1, chosen[-1][:, None],
                                            -float('inf'))
        chosen.append(remaining_TE.argmax(1))
    return torch.stack(chosen, 1)


def group_by_key(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Stable order that sorts rows by key, and how many each key has.

    Args:
        keys_N: (N,) int64; rows with the key ``num_keys`` are left out.
        num_keys: number of keys.

    Returns:
        order (M,) int64 with M <= N, and counts (num_keys,) int64.
    """
    counts = torch.bincount(keys_N, minlength=num_keys + 1)
    # The sort is a radix sort; short keys take fewer passes.
    short_N = keys_N.to(torch.uint8 if num_keys < 255 else torch.int32)
    order_N = torch.sort(short_N, stable=True).indices
    num_absent = int(counts[num_keys])
    return order_N[:len(order_N) - num_absent], counts[:num_keys]


PRIORITIES = ('first_come', 'bpr', 'bpr_sum')


def fill_order(scores_TE: Tensor, expert_ids_TK: Tensor,
               priority: str) -> Tensor:
    """(T*K,) int64, flat (token, choice) pairs in the order slots are given.

    All first choices precede all second choices. Inside a choice, tokens come
    in their order ('first_come'), or by falling priority (Batch Prioritized
    Routing, 2106.05974, 4.1), which is the token's largest score ('bpr') or
    the sum of its chosen scores ('bpr_sum'); ties by position.
    """
    num_tokens, k = expert_ids_TK.shape
    priority_T = _priorities(scores_TE, expert_ids_TK, priority)
    if priority_T is None:
        tokens_T = torch.arange(num_tokens, device=expert_ids_TK.device)
    else:
        tokens_T = torch.sort(priority_T, descending=True, stable=True).indices
    choices_K1 = torch.arange(k, device=tokens_T.device)[:, None]
    return (tokens_T * k + choices_K1).flatten()


def _priorities(scores_TE: Tensor, expert_ids_TK: Tensor,
                priority: str) -> Tensor | None:
    """(T,), or None for 'first_come'."""
    if priority == 'first_come':
        return None
    chosen = expert_ids_TK[:, :1] if priority == 'bpr' else expert_ids_TK
    return scores_TE.detach().gather(1, chosen).sum(1)


def limit_to_capacity(order_M: Tensor, counts: Tensor,
                      capacity: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the first rows of each key, as many as it has slots.

    Args:
        order_M: (M,) rows grouped by key, most deserving first.
        counts: (num_keys,) rows of each key.
        capacity: (num_keys,) slots of each key.

    Returns:
        The kept rows, still grouped, and their counts.
    """
    starts = counts.cumsum(0) - counts
    limit_M = (starts + capacity).repeat_interleave(
        counts, output_size=len(order_M))
    place_M = torch.arange(len(order_M), device=order_M.device)
    return order_M[place_M < limit_M], torch.minimum(counts, capacity)
