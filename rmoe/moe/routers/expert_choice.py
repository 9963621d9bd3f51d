"""Routers whose experts choose tokens (expert choice).

Axis letters as in routing.py.
"""
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from rmoe import compat
from rmoe.moe import assignment, transport
from rmoe.moe.registry import MODELS
from rmoe.moe.routers.base import ScoredRouter, group_capacity
from rmoe.moe.routers.token_choice import (
    check_combine,
    check_iterations,
    sinkhorn_plan,
)
from rmoe.moe.routing import Count, Routing, compute_capacity


@MODELS.register_module()
class ExpertChoiceRouter(ScoredRouter):
    """Each expert takes its C best tokens of each group (2202.09368).

    Experts rank tokens by each token's softmax over experts, which is also
    the gate. Loads are equal by construction, so there is no auxiliary loss.
    A token may be taken by several experts or by none.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        capacity_factor: experts per token, on average; C is
            ceil(tokens of the group * capacity_factor / E), but not more than
            the tokens of the group.
        eval_capacity_factor: the same in evaluation; None means as in
            training.
        capacity_multiple: C is rounded up to a multiple of it.
        scorer: config of the scorer, which computes the logits; None means
            ``dict(type='LinearScorer')``.
        noise_std: in training, logits get Gaussian noise with the standard
            deviation noise_std / E; 0 switches it off.
        group: the tokens among which an expert chooses in training: those of
            an 'image', of the 'batch', or of a number of images.
        eval_group: the same in evaluation; 'image' makes results independent
            of the other images in the batch.

    Raises:
        ValueError: for options that make no sense.
    """

    keeps_every_token = False

    def __init__(self,
                 dim: int,
                 num_experts: int,
                 capacity_factor: float = 1.0,
                 eval_capacity_factor: float | None = None,
                 capacity_multiple: int = 1,
                 scorer: Mapping | None = None,
                 noise_std: float = 1.0,
                 group: str | int = 'image',
                 eval_group: str | int = 'image') -> None:
        super().__init__(dim, num_experts, scorer, noise_std, group,
                         eval_group)
        for factor in (capacity_factor, eval_capacity_factor):
            if factor is not None:
                compute_capacity(1, num_experts, factor, capacity_multiple)
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.capacity_multiple = capacity_multiple

    @property
    def experts_per_token(self) -> float:
        return min(self._factor(), self.num_experts)

    def _factor(self) -> float:
        """The capacity factor of the present mode."""
        if self.training or self.eval_capacity_factor is None:
            return self.capacity_factor
        return self.eval_capacity_factor

    def _route(self, x_TD: Tensor, valid_T: Tensor | None,
               num_groups: int) -> Routing:
        logits_TE = self._logits(x_TD)
        noisy_TE = self._add_noise(logits_TE)
        capacity, most = group_capacity(self._slots, len(x_TD), valid_T,
                                        num_groups)
        scores_TE, gates_TE = self._scores(noisy_TE, valid_T, num_groups,
                                           capacity)
        allowed = self._allowed(scores_TE, valid_T)
        groups = (num_groups, len(x_TD) // num_groups)
        rows, pairs_N = assignment.choose_tokens(
            scores_TE.unflatten(0, groups), capacity, most,
            None if allowed is None else allowed.unflatten(0, groups))
        return Routing(rows, gates_TE.t().flatten().index_select(0, pairs_N),
                       logits_TE, scores_TE)

    def _slots(self, num_tokens: Count) -> Count:
        """Slots per expert in a group of so many tokens."""
        slots = compute_capacity(num_tokens, self.num_experts,
                                 self._factor(), self.capacity_multiple)
        if isinstance(slots, Tensor):
            return torch.minimum(slots, num_tokens)
        return min(slots, num_tokens)

    def _scores(self, noisy_TE: Tensor, valid_T: Tensor | None,
                num_groups: int, capacity: assignment.Capacity
                ) -> tuple[Tensor, Tensor]:
        """Return the scores by which experts choose tokens, and the gates,
        both (T, E)."""
        probs_TE = noisy_TE.softmax(1)
        return probs_TE, probs_TE

    def _allowed(self, scores_TE: Tensor,
                 valid_T: Tensor | None) -> Tensor | None:
        """(T, E) or (T, 1) bool, True where an expert may choose a token;
        None allows all pairs."""
        return None if valid_T is None else valid_T[:, None]

    def extra_repr(self) -> str:
        return (f'num_experts={self.num_experts}, '
                f'capacity_factor={self.capacity_factor}, '
                f'noise_std={self.noise_std}, group={self.group!r}')


@MODELS.register_module()
class SinkhornExpertChoiceRouter(ExpertChoiceRouter):
    """Each expert takes its C best tokens by a balanced transport plan.

    In the plan (2401.15969, :func:`rmoe.moe.transport.sinkhorn`) each token
    has the same total mass, so fewer tokens are left without an expert than
    with the softmax.

    Args:
        dim: D.
        num_experts: E.
        capacity_factor: see :class:`ExpertChoiceRouter`.
        eval_capacity_factor: the same in evaluation.
        capacity_multiple: C is rounded up to a multiple of it.
        iterations: Sinkhorn iterations.
        combine: what the gates are: 'softmax' of the logits, or the 'plan',
            through which the router then gets its gradient.
        scorer: config of the scorer.
        noise_std: noise on the logits from which plan and gates are computed.
        group: the tokens that share a plan in training.
        eval_group: the tokens that share a plan in evaluation.

    Raises:
        ValueError: for options that make no sense.
    """

    def __init__(self,
                 dim: int,
                 num_experts: int,
                 capacity_factor: float = 1.0,
                 eval_capacity_factor: float | None = None,
                 capacity_multiple: int = 1,
                 iterations: int = 20,
                 combine: str = 'softmax',
                 scorer: Mapping | None = None,
                 noise_std: float = 1.0,
                 group: str | int = 'image',
                 eval_group: str | int = 'image') -> None:
        super().__init__(dim, num_experts, capacity_factor,
                         eval_capacity_factor, capacity_multiple, scorer,
                         noise_std, group, eval_group)
        check_iterations(iterations)
        check_combine(combine)
        self.iterations = iterations
        self.combine = combine

    def _scores(self, noisy_TE: Tensor, valid_T: Tensor | None,
                num_groups: int, capacity: assignment.Capacity
                ) -> tuple[Tensor, Tensor]:
        plan_TE = sinkhorn_plan(noisy_TE, valid_T, num_groups,
                                self.iterations,
                                differentiable=self.combine == 'plan')
        return plan_TE, (plan_TE if self.combine == 'plan'
                         else noisy_TE.softmax(1))


@MODELS.register_module()
class SparseExpertChoiceRouter(ExpertChoiceRouter):
    """Each expert takes its tokens of a transport plan that is sparse.

    The plan comes from sparsity-constrained transport (2209.15466, as a
    router in 2401.15969) on the softmax of the logits, with at most C tokens
    per expert. An expert takes the tokens to which the plan gives mass; the
    gate is the softmax. No gradient flows through the plan, and logits get no
    noise.

    Args:
        dim: D.
        num_experts: E.
        capacity_factor: see :class:`ExpertChoiceRouter`. A plan needs at
            least 1; more gives the solver room to find one.
        eval_capacity_factor: the same in evaluation.
        capacity_multiple: C is rounded up to a multiple of it.
        iterations: Adam steps of the solver.
        solver: 'matching', which meets the marginals of the plan (a mass of
            one for each token, equal shares for experts), or 'adam', the
            method of the published router, which does not; see
            :func:`rmoe.moe.transport.k_sparse_plan`.
        scorer: config of the scorer.
        group: the tokens that share a plan in training.
        eval_group: the tokens that share a plan in evaluation.

    Attributes:
        plan_error: the distance of the last plan from its marginals. With
            'matching', the first plan that did not converge causes a warning.

    Raises:
        ValueError: for options that make no sense.
    """

    def __init__(self,
                 dim: int,
                 num_experts: int,
                 capacity_factor: float = 2.0,
                 eval_capacity_factor: float | None = None,
                 capacity_multiple: int = 1,
                 iterations: int = 20,
                 solver: str = 'matching',
                 scorer: Mapping | None = None,
                 group: str | int = 'image',
                 eval_group: str | int = 'image') -> None:
        super().__init__(dim, num_experts, capacity_factor,
                         eval_capacity_factor, capacity_multiple, scorer, 0.,
                         group, eval_group)
        check_iterations(iterations)
        if solver not in transport.SOLVERS:
            raise ValueError(f'solver={solver!r} is not one of '
                             f'{transport.SOLVERS}')
        self.iterations = iterations
        self.solver = solver
        self.plan_error = 0.
        self._warned = False

    def _scores(self, noisy_TE: Tensor, valid_T: Tensor | None,
                num_groups: int, capacity: assignment.Capacity
                ) -> tuple[Tensor, Tensor]:
        if compat.is_compiling():
            raise ValueError(
                'a SparseExpertChoiceRouter cannot be compiled or exported, '
                'because the number of steps of its solver depends on the '
                'tokens. Use '
                "dict(type='SinkhornExpertChoiceRouter', combine='softmax') "
                'or an ExpertChoiceRouter, which take the same weights')
        probs_TE = noisy_TE.softmax(1)
        if not len(probs_TE):
            return probs_TE, probs_TE
        groups = (num_groups, -1)
        capacity_G = torch.as_tensor(
            capacity, device=probs_TE.device).expand(num_groups)
        with torch.no_grad():
            plan = transport.k_sparse_plan(
                probs_TE.detach().unflatten(0, groups), capacity_G,
                self.iterations, self.solver,
                None if valid_T is None else valid_T.view(groups))
        self.plan_error = float(plan.error_G.max())
        if self.solver == 'matching' and not plan.converged():
            self._warn(capacity_G)
        return plan.plan_GSE.flatten(0, 1), probs_TE

    def _allowed(self, scores_TE: Tensor,
                 valid_T: Tensor | None) -> Tensor | None:
        # The plan gives no mass to padding, so ``valid_T`` is not needed.
        return scores_TE > 0

    def _warn(self, capacity_G: Tensor) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            'the k-sparse plan of a router did not converge: the mass of a '
            f'token is off by {self.plan_error:.2g}, for {self.num_experts} '
            f'experts that may take {int(capacity_G.min())} or more tokens '
            'each. A plan surely exists if each may take two more than its '
            f'fair share: raise capacity_factor (now {self._factor()}). Until '
            "then tokens are chosen by the plan of solver='adam'",
            stacklevel=2)
