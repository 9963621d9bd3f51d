"""Transport plans between tokens and experts: pure functions on a score
matrix.

A plan is non-negative; each token gives a mass of one, each expert takes its
fair share, S / E. Axis letters as in routing.py; A is the similarity (S, E).
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from rmoe.moe import assignment

# Less than the log of any mass.
LOG_NOTHING = -1e30
# The recipe of the reference router (Adam on the semi-dual).
ADAM_RATE, ADAM_BETAS, ADAM_EPS, ADAM_STOP = 1e-2, (0.9, 0.999), 1e-8, 1e-3
# A plan whose marginals are off by more than this did not converge.
TOLERANCE = 1e-4
NEWTON_STEPS = 30
# Less than any similarity plus its dual variable, and more than a difference
# of two; small, or adding them would round the difference away.
NEVER = -1e4
FIRST = 1e2


def sinkhorn(logits_GSE: Tensor, iterations: int = 20,
             valid_GS: Tensor | None = None) -> Tensor:
    """(G, S, E) the entropic plan, argmax <T, L> + H(T), of each group.

    Alternately scales experts and then tokens (2401.15969, with epsilon 1), a
    fixed number of times, in the log domain: logits of any size are safe. So
    tokens' sums are exact and experts' sums nearly so. Differentiable.

    Args:
        logits_GSE: (G, S, E) float32, L.
        iterations: how often both are scaled.
        valid_GS: (G, S) bool; padded tokens give nothing and get a row of
            zeros.
    """
    if not logits_GSE.numel():
        return logits_GSE
    # The long axis last: sums over it run over contiguous memory.
    log_plan = logits_GSE.transpose(1, 2).contiguous()
    padded = None if valid_GS is None else ~valid_GS[:, None]
    token_scale = torch.zeros_like(log_plan[:, :1])
    expert_scale = torch.zeros_like(log_plan[:, :, :1])
    for _ in range(iterations):
        given = log_plan + token_scale
        if padded is not None:
            # Not -inf: the gradient of a sum of nothing is nan.
            given = given.masked_fill(padded, LOG_NOTHING)
        # To one, not to its share: shares are equal, so that their size
        # cancels when tokens are scaled.
        expert_scale = -torch.logsumexp(given, 2, keepdim=True)
        token_scale = -torch.logsumexp(log_plan + expert_scale, 1,
                                       keepdim=True)
    plan = (log_plan + expert_scale + token_scale).exp()
    if padded is not None:
        plan = plan.masked_fill(padded, 0.)
    return plan.transpose(1, 2)


@dataclass(frozen=True)
class SparsePlan:
    """A plan with at most C tokens per expert.

    Attributes:
        plan_GSE: (G, S, E).
        error_G: (G,) the largest distance of a token's sum from one. Experts'
            sums are exact to rounding.
    """
    plan_GSE: Tensor
    error_G: Tensor

    def converged(self) -> bool:
        """Does every group have the marginals it should have?"""
        return bool((self.error_G <= TOLERANCE).all())


SOLVERS = ('matching', 'adam')


def k_sparse_plan(similarity_GSE: Tensor, capacity_G: Tensor,
                  iterations: int = 20, solver: str = 'matching',
                  valid_GS: Tensor | None = None) -> SparsePlan:
    """An l2-regularised plan with at most C tokens per expert.

    argmax <T, A> - ||T||^2 / 2 under the marginals and the cardinality limit
    (Sparsity-Constrained Optimal Transport, 2209.15466). The limit makes it
    non-convex: no method finds the best plan in general, and with E * C < S
    there is none.

    'adam' is the recipe of the reference router: Adam on the convex
    semi-dual, where each token's dual variable is added to its similarities
    and each expert projects its C largest on the simplex, so that a token
    that got too little rises. It ends far from the tokens' marginals.

    'matching' starts from those dual variables and meets the marginals. The
    best plan on given places, C tokens of each expert, is a convex problem,
    solved by Newton's method.

    1. Try each expert's C largest entries.
    2. Where they allow no plan: match each token with one expert, by deferred
       acceptance (a stable matching) on floor(S / E) places per expert; share
       the fewer than E tokens that remain out evenly, at most two to an
       expert; fill each expert's places up to C with its largest entries. Now
       a plan exists if C >= S / E and E divides S, or C >= floor(S / E) + 2.

    Args:
        similarity_GSE: (G, S, E) float32, A; the softmax of the logits.
        capacity_G: (G,) int64, C of each group, from 1 to S.
        iterations: Adam steps.
        solver: 'matching' or 'adam'.
        valid_GS: (G, S) bool; padded tokens give nothing.

    Returns:
        The plan and how far it is from its marginals; a group that has no
        plan gets Adam's.
    """
    groups, tokens, num_experts = similarity_GSE.shape
    similarity = similarity_GSE.detach().transpose(1, 2).contiguous()
    mass_GS = similarity.new_ones(groups, tokens)
    if valid_GS is not None:
        mass_GS = valid_GS.to(similarity.dtype)
        similarity = similarity.masked_fill(~valid_GS[:, None], NEVER)
    share_G = mass_GS.sum(1) / num_experts
    if not tokens:
        return SparsePlan(similarity_GSE, share_G)
    capacity_G = capacity_G.clamp_min(1)
    dual_GS = _adam(similarity, mass_GS, share_G, capacity_G, iterations)
    raised = similarity + dual_GS[:, None]
    plan = _project_columns(raised, share_G, capacity_G)
    if solver == 'matching':
        plan = _meet_marginals(
            plan, largest(raised, capacity_G[:, None]), similarity, mass_GS,
            share_G)
        if bool((_token_error(plan, mass_GS) > TOLERANCE).any()):
            plan = _meet_marginals(
                plan, _support(raised, mass_GS > 0, share_G, capacity_G),
                similarity, mass_GS, share_G)
    return SparsePlan(plan.transpose(1, 2), _token_error(plan, mass_GS))


def _meet_marginals(plan_GES: Tensor, support_GES: Tensor,
                    similarity_GES: Tensor, mass_GS: Tensor,
                    share_G: Tensor) -> Tensor:
    """Replace the plan of each group that is off by the best one on its
    support, where there is one."""
    covered_G = (support_GES.any(1) | (mass_GS == 0)).all(1)
    todo_G = covered_G & (_token_error(plan_GES, mass_GS) > TOLERANCE)
    if not bool(todo_G.any()):
        return plan_GES
    solved = _solve_on_support(similarity_GES[todo_G], support_GES[todo_G],
                               mass_GS[todo_G], share_G[todo_G])
    good_G = _token_error(solved, mass_GS[todo_G]) <= TOLERANCE
    plan_GES = plan_GES.clone()
    plan_GES[todo_G] = torch.where(good_G[:, None, None], solved,
                                   plan_GES[todo_G])
    return plan_GES


def _token_error(plan_GES: Tensor, mass_GS: Tensor) -> Tensor:
    return (plan_GES.sum(1) - mass_GS).abs().amax(1)


def _adam(similarity_GES: Tensor, mass_GS: Tensor, share_G: Tensor,
          capacity_G: Tensor, iterations: int) -> Tensor:
    dual = torch.zeros_like(mass_GS)
    first, second = torch.zeros_like(dual), torch.zeros_like(dual)
    beta1, beta2 = ADAM_BETAS
    for step in range(1, iterations + 1):
        plan = _project_columns(similarity_GES + dual[:, None], share_G,
                                capacity_G)
        gradient = plan.sum(1) - mass_GS
        # A group that is done stands still, whatever the others do.
        going_G1 = (gradient.norm(dim=1) > ADAM_STOP)[:, None]
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.square()
        update = (first / (1 - beta1**step)) / (
            (second / (1 - beta2**step)).sqrt() + ADAM_EPS)
        dual = dual - ADAM_RATE * update * going_G1
    return dual


def _project_columns(raised_GES: Tensor, share_G: Tensor,
                     capacity_G: Tensor) -> Tensor:
    """(G, E, S), each expert's plan: its C largest entries, projected on the
    simplex of its share."""
    held = largest(raised_GES, capacity_G[:, None])
    return project_on_simplex(raised_GES, held, share_G[:, None])


def project_on_simplex(values: Tensor, held: Tensor, total: Tensor) -> Tensor:
    """Nearest point with entries >= 0 that sum to ``total``, and zeros where
    ``held`` is False (Michelot, 1986).

    Args:
        values: (..., S).
        held: (..., S) bool, at least one in each row.
        total: (...), broadcastable.
    """
    active = held
    while True:
        threshold = ((values * active).sum(-1) - total) / active.sum(-1)
        fewer = active & (values > threshold[..., None])
        # A total of zero leaves no entry above the threshold.
        fewer = torch.where(fewer.any(-1, keepdim=True), fewer, active)
        if torch.equal(fewer, active):
            break
        active = fewer
    return (values - threshold[..., None]).clamp_min(0) * held


def _support(raised_GES: Tensor, valid_GS: Tensor, share_G: Tensor,
             capacity_G: Tensor) -> Tensor:
    """(G, E, S) bool, C tokens of each expert, among which a plan exists."""
    num_experts = raised_GES.shape[1]
    places_G = torch.minimum(share_G.floor().long(), capacity_G)
    matched = deferred_acceptance(raised_GES, places_G)
    # The mass of the tokens that remain, laid end to end, is cut in E pieces.
    remaining_GS = valid_GS & ~matched.any(1)
    count_G1 = remaining_GS.sum(1, keepdim=True)
    place_GS = remaining_GS.cumsum(1) - 1
    expert_E = torch.arange(num_experts, device=raised_GES.device)
    first_GE = expert_E * count_G1 // num_experts
    last_GE = ((expert_E + 1) * count_G1 - 1) // num_experts
    cut = remaining_GS[:, None] & (
        place_GS[:, None] >= first_GE[..., None]) & (
            place_GS[:, None] <= last_GE[..., None])
    return largest(raised_GES + FIRST * (cut | matched), capacity_G[:, None])


def largest(values: Tensor, count: Tensor) -> Tensor:
    """(..., S) bool, the ``count`` largest of the last axis; reads ``count``,
    which is broadcastable to (...)."""
    most = int(count.max())
    return assignment.largest(
        values, most if int(count.min()) == most else count, most)


def deferred_acceptance(values_GES: Tensor, places_G: Tensor) -> Tensor:
    """(G, E, S) bool, at most one expert per token, each with so many tokens
    as it has places.

    Tokens propose to the best expert that has not rejected them, experts keep
    the best (Gale and Shapley, 1962). Every place is taken if there are
    tokens enough.
    """
    rejected = values_GES <= NEVER
    while True:
        wanted = values_GES.masked_fill(rejected, 2 * NEVER)
        proposed = torch.zeros_like(rejected).scatter_(
            1, wanted.argmax(1, keepdim=True), True) & ~rejected
        if not (proposed.sum(2) > places_G[:, None]).any():
            return proposed
        kept = largest(values_GES.masked_fill(~proposed, 2 * NEVER),
                       places_G[:, None])
        rejected = rejected | (proposed & ~kept)


def _solve_on_support(similarity_GES: Tensor, support_GES: Tensor,
                      mass_GS: Tensor, share_G: Tensor) -> Tensor:
    """(G, E, S) the plan that is zero outside ``support``, by Newton's method
    on the dual, T = max(A + a_token + b_expert, 0).

    The Hessian is diagonal but for E rows, so that a step solves E x E
    systems.
    """
    # float64: a step is exact, two or three of them are enough.
    base = torch.where(support_GES, similarity_GES, -1e9).double()
    mass, share = mass_GS.double(), share_G.double()[:, None]
    token, expert = torch.zeros_like(mass), torch.zeros_like(base[:, :, 0])
    ridge = 1e-6 * torch.eye(base.shape[1], dtype=base.dtype,
                             device=base.device)

    def evaluate(token: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
        plan = (base + token[:, None] + expert[:, :, None]).clamp_min(0)
        value = 0.5 * plan.square().sum((1, 2)) - (
            mass * token).sum(1) - (share * expert).sum(1)
        return plan, value

    plan, value = evaluate(token, expert)
    for _ in range(NEWTON_STEPS):
        token_error, expert_error = plan.sum(1) - mass, plan.sum(2) - share
        if max(token_error.abs().max(), expert_error.abs().max()) < (
                0.01 * TOLERANCE):
            break
        active = (plan > 0).to(base.dtype)
        held = active.sum(1, keepdim=True) + 1e-6
        scaled = active / held
        system = torch.diag_embed(active.sum(2)) - scaled @ active.mT + ridge
        right = (scaled @ token_error[..., None])[..., 0] - expert_error
        expert_step = torch.linalg.solve(system, right)
        token_step = (-token_error - (active.mT @ expert_step[..., None]
                                      )[..., 0]) / held[:, 0]
        slope = (token_error * token_step).sum(1) + (
            expert_error * expert_step).sum(1)
        # Halve each group's step until its value falls enough.
        length = torch.ones_like(value)
        for _ in range(20):
            size = length[:, None]
            plan, trial = evaluate(token + size * token_step,
                                   expert + size * expert_step)
            enough = trial <= value + 1e-4 * length * slope + 1e-12
            if enough.all():
                break
            length = torch.where(enough, length, length / 2)
        token, expert = token + size * token_step, expert + size * expert_step
        value = trial
    return plan.to(similarity_GES.dtype)
