"""One class per router. A router maps tokens to a :class:`Routing`.

Axis letters as in routing.py.
"""
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe.moe import assignment, losses
from rmoe.moe.routing import Routing, compute_capacity
from rmoe.registry import MODELS

# V-MoE's weights (papers: 0.01 for the mean of the two losses).
DEFAULT_LOSS_WEIGHTS = {'importance': 0.005, 'load': 0.005}
LOSS_NAMES = ('importance', 'load', 'gshard', 'z')
PRIORITIES = ('first_come', 'batch')


@MODELS.register_module()
class TokenChoiceRouter(nn.Module):
    """Each token chooses its k best experts: softmax, then top-k.

    The router of V-MoE (2106.05974) and RMoE (2204.09636). Gates are the
    softmax over all experts, not renormalised over the chosen ones: a router
    with renormalised top-1 gates gets no gradient from the task.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        top_k: K, experts per token.
        noise_std: logits get Gaussian noise of deviation noise_std / E in
            training; 0 switches it off.
        capacity_factor: slots of an expert over its fair share, in training.
            None drops nothing.
        eval_capacity_factor: the same in evaluation. None drops nothing and
            keeps images independent of their batch-mates.
        capacity_multiple: slots per expert are rounded up to a multiple.
        priority: who gets a slot where experts are full: 'first_come', or
            'batch' for Batch Prioritized Routing (highest gate first).
        loss_weights: weights of the auxiliary losses 'importance', 'load'
            (needs noise), 'gshard' and 'z'; those not named are off. None
            means importance and load at 0.005 each.
        init_std: deviation of the initial weights.

    Raises:
        ValueError: for a count, factor, priority or loss that makes no sense.
    """

    def __init__(self,
                 dim: int,
                 num_experts: int,
                 top_k: int = 1,
                 noise_std: float = 1.0,
                 capacity_factor: float | None = None,
                 eval_capacity_factor: float | None = None,
                 capacity_multiple: int = 4,
                 priority: str = 'first_come',
                 loss_weights: Mapping[str, float] | None = None,
                 init_std: float = 0.02) -> None:
        super().__init__()
        if loss_weights is None:
            loss_weights = DEFAULT_LOSS_WEIGHTS if noise_std else {
                'importance': 0.01}
        _check_token_choice(num_experts, top_k, noise_std, priority,
                            loss_weights)
        for factor in (capacity_factor, eval_capacity_factor):
            if factor is not None:
                compute_capacity(1, num_experts, factor, capacity_multiple)
        self.num_experts = num_experts
        self.top_k = top_k
        self.noise_std = noise_std
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.capacity_multiple = capacity_multiple
        self.priority = priority
        self.loss_weights = dict(loss_weights)
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.init_weights()

    def init_weights(self) -> None:
        # Small and random: with zeros every token would tie and the lowest
        # expert index would take them all.
        nn.init.trunc_normal_(self.weight, std=self.init_std)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Routing:
        """Choose experts.

        Args:
            x_TD: (T, D) tokens.
            valid_T: (T,) bool, False for padding, which then steers nothing:
                it is routed to nobody and counts in no loss, load or
                capacity.
        """
        # Rounding to bfloat16 flips choices between near-equal experts, so
        # autocast stays outside.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            noisy_TE = self._add_noise(logits_TE)
            probs_TE = noisy_TE.softmax(1)
            token_ids_N, experts_N, counts_E, demand_E = self._assign(
                probs_TE, valid_T)
            return Routing(
                token_ids_N=token_ids_N,
                weights_N=probs_TE[token_ids_N, experts_N],
                counts_E=counts_E,
                demand_E=demand_E,
                logits_TE=logits_TE,
                probs_TE=probs_TE,
                losses=self._losses(logits_TE, noisy_TE, valid_T))

    def _add_noise(self, logits_TE: Tensor) -> Tensor:
        if not (self.training and self.noise_std):
            return logits_TE
        return logits_TE + self._noise_sd * torch.randn_like(logits_TE)

    @property
    def _noise_sd(self) -> float:
        return self.noise_std / self.num_experts

    def _assign(self, probs_TE: Tensor, valid_T: Tensor | None
                ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token and expert of each kept row, kept rows and demand per
        expert."""
        expert_ids_TK = assignment.top_k(probs_TE, self.top_k)
        if valid_T is not None:
            expert_ids_TK = expert_ids_TK.masked_fill(~valid_T[:, None],
                                                      self.num_experts)
        factor = (self.capacity_factor
                  if self.training else self.eval_capacity_factor)
        flat_N = expert_ids_TK.flatten()
        if factor is None:
            order_N, counts_E = assignment.group_by_expert(
                flat_N, self.num_experts)
            demand_E = counts_E
        else:
            by_gate = self.priority == 'batch'
            fill_N = assignment.fill_order(
                probs_TE.amax(1) if by_gate else None, expert_ids_TK)
            grouped_N, demand_E = assignment.group_by_expert(
                flat_N[fill_N], self.num_experts)
            capacity = compute_capacity(
                len(grouped_N), self.num_experts, factor,
                self.capacity_multiple)
            kept_N, counts_E = assignment.limit_to_capacity(
                grouped_N, demand_E, capacity)
            order_N = fill_N[kept_N]
        token_ids_N = order_N.div(self.top_k, rounding_mode='floor')
        return token_ids_N, flat_N[order_N], counts_E, demand_E

    def _losses(self, logits_TE: Tensor, noisy_TE: Tensor,
                valid_T: Tensor | None) -> dict[str, Tensor]:
        if not self.training:
            return {}
        if valid_T is not None:
            logits_TE, noisy_TE = logits_TE[valid_T], noisy_TE[valid_T]
        compute = {
            'importance': lambda: losses.importance_loss(logits_TE.softmax(1)),
            'load': lambda: losses.load_loss(logits_TE, noisy_TE, self.top_k,
                                             self._noise_sd),
            'gshard': lambda: losses.gshard_loss(noisy_TE.softmax(1)),
            'z': lambda: losses.z_loss(logits_TE),
        }
        # A loss of weight 0 is skipped, not multiplied: 0 * inf is nan.
        return {
            name: weight * compute[name]()
            for name, weight in self.loss_weights.items() if weight
        }

    def extra_repr(self) -> str:
        return (f'num_experts={self.num_experts}, top_k={self.top_k}, '
                f'noise_std={self.noise_std}, '
                f'capacity_factor={self.capacity_factor}, '
                f'priority={self.priority!r}, '
                f'loss_weights={self.loss_weights}')


def _check_token_choice(num_experts: int, top_k: int, noise_std: float,
                        priority: str, loss_weights: Mapping[str, float]
                        ) -> None:
    if num_experts < 1:
        raise ValueError(f'num_experts={num_experts} must be at least 1')
    if not 1 <= top_k <= num_experts:
        raise ValueError(f'top_k={top_k} must lie between 1 and '
                         f'num_experts={num_experts}')
    if noise_std < 0:
        raise ValueError(f'noise_std={noise_std} must not be negative')
    if priority not in PRIORITIES:
        raise ValueError(f'priority={priority!r} is not one of {PRIORITIES}')
    for name, weight in loss_weights.items():
        if name not in LOSS_NAMES:
            raise ValueError(f'loss_weights names {name!r}; the losses are '
                             f'{LOSS_NAMES}')
        if weight < 0:
            raise ValueError(f'loss_weights[{name!r}]={weight} must not be '
                             'negative')
    if loss_weights.get('load') and not noise_std:
        raise ValueError("the 'load' loss is defined by the router's noise: "
                         'set noise_std > 0 or drop it from loss_weights')
