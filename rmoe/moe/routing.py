"""What a router decided, as data.

Axis letters, here and in every file of this package: B images, T tokens,
E experts, K choices per token, C slots per expert, N routed rows (tokens
counted once per expert that kept them), D model width, H hidden width.
"""
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The assignment of tokens to experts for one call of a MoE layer.

    Attributes:
        token_ids_N: (N,) int64, the token of each routed row; rows are sorted
            by expert.
        weights_N: (N,) float32, the gate of each row, differentiable.
        counts_E: (E,) int64, rows of each expert; sums to N.
        demand_E: (E,) int64, rows each expert would have got without a
            capacity limit (equal to ``counts_E`` when dropless).
        logits_TE: (T, E) float32, noise-free router logits.
        probs_TE: (T, E) float32, the scores experts were chosen by.
        losses: auxiliary losses by name, already weighted; empty in
            evaluation.
    """
    token_ids_N: Tensor
    weights_N: Tensor
    counts_E: Tensor
    demand_E: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.logits_TE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[1]

    def expert_ids(self) -> Tensor:
        """(N,) int64, the expert of each routed row."""
        experts = torch.arange(self.num_experts, device=self.counts_E.device)
        return experts.repeat_interleave(
            self.counts_E, output_size=self.token_ids_N.numel())

    def kept_per_token(self) -> Tensor:
        """(T,) int64, how many experts kept each token."""
        return torch.bincount(self.token_ids_N, minlength=self.num_tokens)

    def dispatch_tensor(self) -> Tensor:
        """(T, E, C) float32, 1 where a token fills a slot of an expert.

        The dispatch tensor of the unified formulation (2401.15969), with C
        the largest load. For tests and analysis: it is never built on the
        fast path.
        """
        return self._scatter_rows(torch.ones_like(self.weights_N))

    def combine_tensor(self) -> Tensor:
        """(T, E, C) float32, the gate at each filled slot."""
        return self._scatter_rows(self.weights_N)

    def _scatter_rows(self, values_N: Tensor) -> Tensor:
        starts_E = self.counts_E.cumsum(0) - self.counts_E
        expert_ids_N = self.expert_ids()
        slots_N = torch.arange(
            len(expert_ids_N), device=starts_E.device) - starts_E[expert_ids_N]
        capacity = int(self.counts_E.max()) if len(expert_ids_N) else 0
        tensor_TEC = values_N.new_zeros(self.num_tokens, self.num_experts,
                                        capacity)
        return tensor_TEC.index_put(
            (self.token_ids_N, expert_ids_N, slots_N), values_N)


def compute_capacity(num_rows: int,
                     num_experts: int,
                     capacity_factor: float,
                     multiple_of: int = 4) -> int:
    """Slots per expert: ceil(rows * factor / experts), rounded up.

    Args:
        num_rows: tokens times choices per token.
        num_experts: E.
        capacity_factor: slots over fair share; must be positive.
        multiple_of: the result is a multiple of this (V-MoE uses 4).

    Raises:
        ValueError: if ``capacity_factor`` is not positive.
    """
    if not capacity_factor > 0:
        raise ValueError(
            f'capacity_factor={capacity_factor} must be positive; leave it '
            'at None to drop nothing')
    capacity = math.ceil(num_rows * capacity_factor / num_experts)
    return max(1, math.ceil(capacity / multiple_of)) * multiple_of
