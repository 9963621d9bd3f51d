"""The decision of a router as data, and the arithmetic of capacity and groups.

Routers return a :class:`Routing` or a :class:`SoftRouting`. The layer, losses,
statistics and plots read it.

Axis letters, here and in every file of this package: B images, T tokens,
G groups, S tokens of one group, E experts, K choices per token, C slots per
expert, N routed rows (tokens counted once per expert that kept them), D model
width, H hidden width.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rmoe.moe.rows import Rows


@dataclass(frozen=True)
class Routing:
    """A sparse assignment: each row is one token at one expert.

    Shapes depend on sizes and options, never on decisions. So there can be
    unserved rows (padding, or tokens over the capacity), which come last, see
    :class:`rmoe.moe.rows.Rows`. Analysis and plots call :meth:`served`, which
    leaves them out.

    Attributes:
        rows: the token and the expert of each row.
        weights_N: (N,) float32, the gate of each row, differentiable.
        logits_TE: (T, E) float32, router logits without noise.
        scores_TE: (T, E) float32, the scores by which the choice was made.
        losses: auxiliary losses by name, multiplied by their weights; empty
            in evaluation.
    """
    rows: Rows
    weights_N: Tensor
    logits_TE: Tensor
    scores_TE: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def token_ids_N(self) -> Tensor:
        """(N,) int64, the token of each row; rows are sorted by expert."""
        return self.rows.token_ids_N

    @property
    def expert_ids_N(self) -> Tensor:
        """(N,) int64, the expert of each row."""
        return self.rows.expert_ids_N

    @property
    def counts_E(self) -> Tensor:
        """(E,) int32, rows that each expert serves."""
        return self.rows.counts_E

    @property
    def demand_E(self) -> Tensor:
        """(E,) int32, rows that each expert would serve without a capacity
        limit; equal to ``counts_E`` if nothing is dropped."""
        return self.rows.demand_E

    @property
    def num_tokens(self) -> int:
        return self.logits_TE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[1]

    @property
    def load_E(self) -> Tensor:
        """(E,), the load of each expert: the tokens that it serves."""
        return self.counts_E

    def served(self, count: int | None = None) -> 'Routing':
        """Return the same routing with the served rows alone.

        Args:
            count: their number, if it is known; None reads it from a tensor.
        """
        rows = self.rows.without_unserved(count)
        return replace(self, rows=rows,
                       weights_N=self.weights_N[:len(rows.token_ids_N)])

    def kept_per_token(self) -> Tensor:
        """(T,) int64, the number of experts that kept each token."""
        return self.rows.kept_per_token()

    def strongest_expert(self) -> Tensor:
        """(T,) int64, the expert with the largest gate for each token; -1 for
        a token that no expert kept."""
        served = self.served()
        gates_TE = self.weights_N.new_full(
            (self.num_tokens, self.num_experts), -1.)
        gates_TE[served.token_ids_N, served.expert_ids_N] = (
            served.weights_N.detach())
        best_T = gates_TE.argmax(1)
        return best_T.masked_fill(self.kept_per_token() == 0, -1)

    def dispatch_tensor(self) -> Tensor:
        """(T, E, C) float32, 1 where a token fills a slot of an expert.

        This is the dispatch tensor of the unified formulation (2401.15969),
        with C the largest load. It is for tests and analysis; the layer never
        builds it.
        """
        return self.served()._scatter_rows(torch.ones_like(self.weights_N))

    def combine_tensor(self) -> Tensor:
        """(T, E, C) float32, the gate at each filled slot, zero elsewhere."""
        return self.served()._scatter_rows(self.weights_N)

    def _scatter_rows(self, values_N: Tensor) -> Tensor:
        starts_E = self.rows.ends_E - self.counts_E
        expert_ids_N = self.expert_ids_N
        slots_N = torch.arange(
            len(expert_ids_N), device=starts_E.device) - starts_E[expert_ids_N]
        capacity = int(self.counts_E.max()) if len(expert_ids_N) else 0
        tensor_TEC = values_N.new_zeros(self.num_tokens, self.num_experts,
                                        capacity)
        return tensor_TEC.index_put(
            (self.token_ids_N, expert_ids_N, slots_N),
            values_N[:len(expert_ids_N)])


@dataclass(frozen=True)
class SoftRouting:
    """A soft assignment: each slot is a mixture of the tokens of its group,
    and each token gets a mixture of the outputs of the slots.

    Here N = E C is the number of slots.

    Attributes:
        dispatch_GSN: (G, S, N) float32, differentiable, the weight of each
            token in each slot; sums to one over the valid tokens of a group.
            Slots are sorted by expert.
        combine_GSN: (G, S, N) float32, differentiable, the weight of each
            slot in each token; sums to one over the slots.
        num_experts: E.
        valid_T: (T,) bool, False for padding; None means all are valid.
    """
    dispatch_GSN: Tensor
    combine_GSN: Tensor
    num_experts: int
    valid_T: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.dispatch_GSN.shape[0] * self.dispatch_GSN.shape[1]

    @property
    def losses(self) -> Mapping[str, Tensor]:
        """Empty: a soft router's loads need no balancing."""
        return {}

    @property
    def load_E(self) -> Tensor:
        """(E,) float32, the load of each expert in tokens: the sum of its
        combine weights over the valid tokens."""
        mass_TE = self._weight_of_experts()
        if self.valid_T is not None:
            mass_TE = mass_TE.masked_fill(~self.valid_T[:, None], 0.)
        return mass_TE.sum(0)

    @property
    def demand_E(self) -> Tensor:
        """(E,) float32, equal to ``load_E``, since nothing is dropped."""
        return self.load_E

    @property
    def counts_E(self) -> Tensor:
        """(E,) int64, slots of each expert over all groups."""
        groups, _, slots = self.dispatch_GSN.shape
        return torch.full((self.num_experts, ),
                          groups * slots // self.num_experts,
                          device=self.dispatch_GSN.device)

    def kept_per_token(self) -> Tensor:
        """(T,) int64, E for each token, since every expert contributes to
        every token."""
        return torch.full((self.num_tokens, ), self.num_experts,
                          device=self.dispatch_GSN.device)

    def strongest_expert(self) -> Tensor:
        """(T,) int64, the expert whose slots have the largest total weight in
        each token."""
        return self._weight_of_experts().argmax(1)

    def dispatch_tensor(self) -> Tensor:
        """(T, E, C), the dispatch tensor of the unified formulation
        (2401.15969). C counts an expert's slots of all groups; weights
        between a token and the slots of another group are zero."""
        return self._spread(self.dispatch_GSN)

    def combine_tensor(self) -> Tensor:
        """(T, E, C), the combine tensor of the unified formulation."""
        return self._spread(self.combine_GSN)

    def _weight_of_experts(self) -> Tensor:
        """(T, E), the total weight of each expert's slots in each token,
        without gradient."""
        return self.combine_GSN.detach().flatten(0, 1).unflatten(
            1, (self.num_experts, -1)).sum(2)

    def _spread(self, tensor_GSN: Tensor) -> Tensor:
        groups, tokens, _ = tensor_GSN.shape
        own_GG = torch.eye(groups, device=tensor_GSN.device)
        tensor = torch.einsum(
            'gsec,gh->gsehc',
            tensor_GSN.unflatten(2, (self.num_experts, -1)), own_GG)
        return tensor.reshape(groups * tokens, self.num_experts, -1)


Count = TypeVar('Count', int, Tensor)


def ceil(value: Any) -> Any:
    """Round a number or a float tensor up to whole numbers."""
    return value.ceil() if isinstance(value, Tensor) else math.ceil(value)


def compute_capacity(num_rows: Count,
                     num_experts: int,
                     capacity_factor: float,
                     multiple_of: int = 4) -> Count:
    """Slots per expert: ceil(rows * factor / experts), rounded up to a
    multiple.

    Args:
        num_rows: tokens times choices per token; a number, or a float64
            tensor of numbers.
        num_experts: E.
        capacity_factor: slots of an expert divided by its fair share of the
            rows; must be positive.
        multiple_of: the result is a multiple of this (V-MoE uses 4).

    Returns:
        At least ``multiple_of``, so every expert has a slot.

    Raises:
        ValueError: if ``capacity_factor`` is not positive or
            ``multiple_of`` below 1.
    """
    if multiple_of < 1:
        raise ValueError(f'capacity_multiple={multiple_of} must be at least 1')
    if not capacity_factor > 0:
        raise ValueError(
            f'capacity_factor={capacity_factor} must be positive; leave it '
            'at None to drop nothing')
    # Half a billionth is subtracted because in floating point 100 * 1.1 is a
    # little more than 110 and would be rounded up to 111.
    capacity = ceil(num_rows * capacity_factor / num_experts - 5e-10)
    capacity = capacity + (capacity == 0)
    return ceil(capacity / multiple_of) * multiple_of


def count_groups(num_images: int, group: str | int,
                 option: str = 'group') -> int:
    """Return G, the number of groups of whole images in a batch.

    Args:
        num_images: B.
        group: 'image', 'batch', or the number of images of a group.
        option: name of the router's option that holds ``group``, for the
            message.

    Raises:
        ValueError: if groups of that size do not divide the batch.
    """
    if group == 'batch' or num_images == 0:
        return 1
    if group == 'image':
        return num_images
    assert isinstance(group, int)
    if num_images % group:
        raise ValueError(
            f'{option}={group} images do not divide a batch of {num_images}: '
            f'set router.{option} to a divisor of the batch size of one GPU, '
            "to 'image' or to 'batch'")
    return num_images // group


def check_group(name: str, group: str | int) -> None:
    """Refuse a ``group`` that is neither 'image', 'batch' nor a count.

    Args:
        name: name of the router's option, for the message.
        group: its value.

    Raises:
        ValueError: if the value is not allowed.
    """
    count = isinstance(group, int) and not isinstance(group, bool)
    if group not in ('image', 'batch') and not (count and int(group) >= 1):
        raise ValueError(f"{name}={group!r} must be 'image', 'batch' or a "
                         'number of images, at least 1')
