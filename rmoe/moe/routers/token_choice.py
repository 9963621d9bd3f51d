"""Routers whose tokens choose experts (token choice).

Axis letters as in routing.py.
"""
from collections.abc import Mapping

import torch
from torch import Tensor

from rmoe.moe import assignment, losses, transport, tutel
from rmoe.moe.registry import MODELS
from rmoe.moe.routers.base import ScoredRouter, check_top_k, group_capacity
from rmoe.moe.routing import Count, Routing, compute_capacity

# V-MoE's weights: the paper gives 0.01 to the mean of the two losses.
DEFAULT_LOSS_WEIGHTS = {'importance': 0.005, 'load': 0.005}
LOSS_NAMES = ('importance', 'load', 'gshard', 'z')
COMBINE_WEIGHTS = ('softmax', 'plan')


@MODELS.register_module()
class TokenChoiceRouter(ScoredRouter):
    """Each token chooses its k best experts: softmax, then top-k.

    This is the router of V-MoE (2106.05974) and RMoE (2204.09636). Gates are
    the softmax over all experts. They are not renormalised over the chosen
    experts, because a renormalised gate is always 1 for k = 1, and the router
    would get no gradient from the task. ``top_k``, ``priority`` and
    ``eval_capacity_factor`` do not belong to any weights, so they can be
    changed after training.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        top_k: K, experts per token.
        scorer: config of the scorer, which computes the logits; None means
            ``dict(type='LinearScorer')``.
        noise_std: in training, logits get Gaussian noise with the standard
            deviation noise_std / E; 0 switches it off.
        capacity_factor: in training, the slots of an expert divided by its
            fair share of the tokens. None drops nothing.
        eval_capacity_factor: the same in evaluation. None drops nothing.
        capacity_multiple: slots per expert are rounded up to a multiple of
            it. None means V-MoE's 4, or Tutel's 1 with ``tutel_compat``.
        priority: which tokens get the slots of an expert that is full:
            'first_come', or, by Batch Prioritized Routing, those with the
            highest gate ('bpr') or the highest sum of chosen gates
            ('bpr_sum').
        loss_weights: weights of the auxiliary losses 'importance', 'load'
            (needs noise), 'gshard' and 'z'; those not named are off. None
            means importance and load at 0.005 each, or importance alone at
            0.01 without noise. The losses are computed over all tokens of
            the batch, for any ``group``.
        group: the tokens that compete with each other for slots in training:
            those of an 'image', of the 'batch', or of a number of images.
            Without a capacity tokens do not compete.
        eval_group: the same in evaluation; 'image' makes results independent
            of the other images in the batch.
        tutel_compat: True uses Tutel's capacity rule and its importance and
            load losses in place of V-MoE's, see :mod:`rmoe.moe.tutel`. A
            capacity factor of 0 then drops nothing, and a negative one counts
            as its absolute value.

    Raises:
        ValueError: for a count, factor, priority or loss that makes no sense.
    """

    def __init__(self,
                 dim: int,
                 num_experts: int,
                 top_k: int = 1,
                 scorer: Mapping | None = None,
                 noise_std: float = 1.0,
                 capacity_factor: float | None = None,
                 eval_capacity_factor: float | None = None,
                 capacity_multiple: int | None = None,
                 priority: str = 'first_come',
                 loss_weights: Mapping[str, float] | None = None,
                 group: str | int = 'image',
                 eval_group: str | int = 'image',
                 tutel_compat: bool = False) -> None:
        super().__init__(dim, num_experts, scorer, noise_std, group,
                         eval_group)
        if loss_weights is None:
            loss_weights = DEFAULT_LOSS_WEIGHTS if noise_std else {
                'importance': 0.01}
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        if capacity_multiple is None:
            capacity_multiple = 1 if tutel_compat else 4
        self.capacity_multiple = capacity_multiple
        self.priority = priority
        self.loss_weights = dict(loss_weights)
        self.tutel_compat = tutel_compat
        self._check()

    @property
    def experts_per_token(self) -> float:
        return self.top_k

    @property
    def keeps_every_token(self) -> bool:  # type: ignore[override]
        return self._factor() is None

    @property
    def balance_advice(self) -> str:  # type: ignore[override]
        return ('larger weights in router.loss_weights (now '
                f'{self.loss_weights}), more noise_std, a lower learning rate '
                'of the router, or fewer experts')

    def _route(self, x_TD: Tensor, valid_T: Tensor | None,
               num_groups: int) -> Routing:
        check_top_k(self.top_k, self.num_experts)
        logits_TE = self._logits(x_TD)
        noisy_TE = self._add_noise(logits_TE)
        scores_TE, gates_TE = self._scores(noisy_TE, valid_T, num_groups)
        ids_TK, gates_TK = assignment.choose(scores_TE, gates_TE, self.top_k)
        capacity, most = self._capacity(len(x_TD), valid_T, num_groups)
        rows, pairs_N = assignment.choose_experts(
            scores_TE, ids_TK, valid_T, capacity, most, num_groups,
            self.priority)
        return Routing(
            rows, gates_TK.flatten().index_select(0, pairs_N), logits_TE,
            scores_TE, self._losses(logits_TE, noisy_TE, valid_T))

    def _scores(self, noisy_TE: Tensor, valid_T: Tensor | None,
                num_groups: int) -> tuple[Tensor, Tensor]:
        """Return the scores by which experts are chosen, and the gates, both
        (T, E)."""
        probs_TE = noisy_TE.softmax(1)
        return probs_TE, probs_TE

    def _capacity(self, num_tokens: int, valid_T: Tensor | None,
                  num_groups: int) -> tuple[assignment.Capacity | None, int]:
        """Return the capacity and its upper bound, as
        :func:`group_capacity`; (None, 0) if nothing is dropped."""
        factor = self._factor()
        if factor is None:
            return None, 0
        return group_capacity(lambda tokens: self._slots(tokens, factor),
                              num_tokens, valid_T, num_groups)

    def _factor(self) -> float | None:
        """The capacity factor of the present mode; None drops nothing."""
        factor = (self.capacity_factor
                  if self.training else self.eval_capacity_factor)
        return None if self.tutel_compat and factor == 0 else factor

    def _slots(self, num_tokens: Count, factor: float) -> Count:
        """Slots per expert for so many tokens."""
        if self.tutel_compat:
            return tutel.compute_capacity(
                num_tokens, self.top_k, self.num_experts, factor,
                self.capacity_multiple)
        return compute_capacity(num_tokens * self.top_k, self.num_experts,
                                factor, self.capacity_multiple)

    def _losses(self, logits_TE: Tensor, noisy_TE: Tensor,
                valid_T: Tensor | None) -> dict[str, Tensor]:
        if not self.training:
            return {}
        # A loss of weight 0 is skipped instead of multiplied by it, because
        # 0 * inf is nan.
        weights = {name: weight for name, weight in self.loss_weights.items()
                   if weight}
        computed: dict[str, Tensor] = {}
        if not self.tutel_compat and {'importance', 'load'} <= weights.keys():
            computed['importance'], computed['load'] = losses.balance_losses(
                logits_TE, noisy_TE, self.top_k, self.noise_sd, valid_T)
        source = tutel if self.tutel_compat else losses
        compute = {
            'importance': lambda: source.importance_loss(
                logits_TE.softmax(1), valid_T),
            'load': lambda: source.load_loss(logits_TE, noisy_TE, self.top_k,
                                             self.noise_sd, valid_T),
            'gshard': lambda: losses.gshard_loss(noisy_TE.softmax(1), valid_T),
            'z': lambda: losses.z_loss(logits_TE, valid_T),
        }
        return {name: weight * (computed[name] if name in computed
                                else compute[name]())
                for name, weight in weights.items()}

    def _check(self) -> None:
        check_top_k(self.top_k, self.num_experts)
        # compute_capacity refuses bad factors and multiples. The factor 1
        # checks the multiple if there is no other.
        factors = [1.]
        if not self.tutel_compat:  # Tutel allows a factor of any sign.
            factors += [factor for factor in (
                self.capacity_factor, self.eval_capacity_factor)
                if factor is not None]
        for factor in factors:
            compute_capacity(1, self.num_experts, factor,
                             self.capacity_multiple)
        if self.priority not in assignment.PRIORITIES:
            raise ValueError(f'priority={self.priority!r} is not one of '
                             f'{assignment.PRIORITIES}')
        for name, weight in self.loss_weights.items():
            if name not in LOSS_NAMES:
                raise ValueError(f'loss_weights names {name!r}; the losses '
                                 f'are {LOSS_NAMES}')
            if not weight >= 0:
                raise ValueError(f'loss_weights[{name!r}]={weight} must not '
                                 'be negative')
        if self.loss_weights.get('load') and not self.noise_std:
            raise ValueError(
                "the 'load' loss is defined by the router's noise: set "
                'noise_std > 0 or drop it from loss_weights')

    def extra_repr(self) -> str:
        return (f'num_experts={self.num_experts}, top_k={self.top_k}, '
                f'noise_std={self.noise_std}, '
                f'capacity_factor={self.capacity_factor}, '
                f'priority={self.priority!r}, '
                f'loss_weights={self.loss_weights}')


@MODELS.register_module()
class SinkhornTokenChoiceRouter(TokenChoiceRouter):
    """Each token chooses its k best experts by a balanced transport plan.

    The plan (2401.15969, :func:`rmoe.moe.transport.sinkhorn`) gives each
    expert its fair share of each group, in training and in evaluation. So no
    auxiliary loss is needed. Since each token goes only to its k largest
    entries of the plan, the loads are balanced only approximately.

    Args:
        dim: D.
        num_experts: E.
        top_k: K.
        iterations: Sinkhorn iterations.
        combine: what the gates are: 'softmax' of the logits, or the 'plan',
            through which the router then gets its gradient.
        scorer: see :class:`TokenChoiceRouter`, like all that follow.
        noise_std: noise on the logits from which plan and gates are computed.
        capacity_factor: in training.
        eval_capacity_factor: in evaluation.
        capacity_multiple: slots are rounded up to a multiple of it.
        priority: which tokens get the slots, by values of the plan.
        loss_weights: None means no auxiliary loss.
        group: the tokens that share a plan in training.
        eval_group: the tokens that share a plan in evaluation.

    Raises:
        ValueError: for options that make no sense.
    """

    def __init__(self,
                 dim: int,
                 num_experts: int,
                 top_k: int = 1,
                 iterations: int = 20,
                 combine: str = 'softmax',
                 scorer: Mapping | None = None,
                 noise_std: float = 1.0,
                 capacity_factor: float | None = None,
                 eval_capacity_factor: float | None = None,
                 capacity_multiple: int = 4,
                 priority: str = 'first_come',
                 loss_weights: Mapping[str, float] | None = None,
                 group: str | int = 'image',
                 eval_group: str | int = 'image') -> None:
        super().__init__(
            dim, num_experts, top_k=top_k, scorer=scorer, noise_std=noise_std,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            capacity_multiple=capacity_multiple, priority=priority,
            loss_weights=loss_weights or {}, group=group,
            eval_group=eval_group)
        check_iterations(iterations)
        check_combine(combine)
        self.iterations = iterations
        self.combine = combine

    def _scores(self, noisy_TE: Tensor, valid_T: Tensor | None,
                num_groups: int) -> tuple[Tensor, Tensor]:
        plan_TE = sinkhorn_plan(noisy_TE, valid_T, num_groups,
                                self.iterations,
                                differentiable=self.combine == 'plan')
        if self.combine == 'plan':
            return plan_TE, plan_TE
        return plan_TE, noisy_TE.softmax(1)


def sinkhorn_plan(logits_TE: Tensor, valid_T: Tensor | None, num_groups: int,
                  iterations: int, differentiable: bool) -> Tensor:
    """(T, E), the Sinkhorn plans of all groups, one after the other.

    Args:
        logits_TE: (T, E).
        valid_T: (T,) bool, False for padding; None means all are valid.
        num_groups: G.
        iterations: Sinkhorn iterations.
        differentiable: whether the plan passes gradients on to the logits.
    """
    valid_GS = None if valid_T is None else valid_T.view(num_groups, -1)
    logits_GSE = logits_TE.unflatten(0, (num_groups, -1))
    if not len(logits_TE):
        return logits_TE
    with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
        return transport.sinkhorn(logits_GSE, iterations,
                                  valid_GS).flatten(0, 1)


def check_iterations(iterations: int) -> None:
    """Refuse a number of iterations below 1.

    Raises:
        ValueError: if it is.
    """
    if iterations < 1:
        raise ValueError(f'iterations={iterations} must be at least 1')


def check_combine(combine: str) -> None:
    """Refuse an unknown kind of gate.

    Raises:
        ValueError: if ``combine`` is not one of ``COMBINE_WEIGHTS``.
    """
    if combine not in COMBINE_WEIGHTS:
        raise ValueError(f'combine={combine!r} is not one of '
                         f'{COMBINE_WEIGHTS}')
