"""Who goes where: pure functions on a score matrix.

Axis letters as in routing.py.
"""
import torch
from torch import Tensor


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """(T, K) int64, the k best experts of each token, best first.

    Ties go to the lower expert index on every device; torch.topk promises
    no order.
    """
    # argmax returns the first maximum, and k passes over a small E are
    # cheaper than a stable sort.
    remaining_TE = scores_TE.detach()
    chosen = [remaining_TE.argmax(1)]
    for _ in range(k - 1):
        remaining_TE = remaining_TE.scatter(1, chosen[-1][:, None],
                                            -float('inf'))
        chosen.append(remaining_TE.argmax(1))
    return torch.stack(chosen, 1)


def group_by_expert(expert_ids_N: Tensor,
                    num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable order that sorts rows by expert, and how many each has.

    Args:
        expert_ids_N: (N,) int64; rows with the id ``num_experts`` belong to
            nobody and are left out.
        num_experts: E.

    Returns:
        order (M,) int64 with M <= N the rows that belong to an expert, and
        counts_E (E,) int64.
    """
    counts = torch.bincount(expert_ids_N, minlength=num_experts + 1)
    # The sort is a radix sort; short keys take fewer passes.
    keys_N = expert_ids_N.to(torch.uint8 if num_experts < 255 else torch.int32)
    order_N = torch.sort(keys_N, stable=True).indices
    num_absent = int(counts[num_experts])
    return order_N[:len(order_N) - num_absent], counts[:num_experts]


def fill_order(priority_T: Tensor | None, expert_ids_TK: Tensor) -> Tensor:
    """(T*K,) int64, flat (token, choice) pairs in the order slots are given.

    All first choices precede all second choices; inside a choice, tokens come
    in their order (first come) or by falling priority, ties by position
    (Batch Prioritized Routing, 2106.05974, 4.1).

    Args:
        priority_T: (T,) float, or None for first come.
        expert_ids_TK: (T, K) int64, only its shape and device are used.
    """
    num_tokens, k = expert_ids_TK.shape
    if priority_T is None:
        tokens_T = torch.arange(num_tokens, device=expert_ids_TK.device)
    else:
        tokens_T = torch.sort(
            priority_T.detach(), descending=True, stable=True).indices
    choices_K1 = torch.arange(k, device=tokens_T.device)[:, None]
    return (tokens_T * k + choices_K1).flatten()


def limit_to_capacity(order_M: Tensor, counts_E: Tensor,
                      capacity: int) -> tuple[Tensor, Tensor]:
    """Keep the first ``capacity`` rows of each expert.

    Args:
        order_M: (M,) rows grouped by expert, most deserving first.
        counts_E: (E,) rows of each expert.
        capacity: C.

    Returns:
        The kept rows, still grouped, and their counts (E,).
    """
    starts_E = counts_E.cumsum(0) - counts_E
    rank_M = torch.arange(
        len(order_M), device=order_M.device) - starts_E.repeat_interleave(
            counts_E, output_size=len(order_M))
    return order_M[rank_M < capacity], counts_E.clamp_max(capacity)
