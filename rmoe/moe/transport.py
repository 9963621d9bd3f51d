"""Transport plans between tokens and experts: pure functions on a score
matrix.

A plan is a matrix of masses >= 0, one for each pair of token and expert. Each
token gives a mass of one in all, and each expert takes its fair share, S / E;
these sums are the plan's marginals. Optimal transport finds the plan that fits
the scores best under the marginals, and so balances the experts' loads. The
Sinkhorn routers use :func:`sinkhorn`, the sparse one :func:`k_sparse_plan`.
Axis letters as in routing.py; A is the (S, E) similarity of tokens and
experts.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from rmoe.moe import assignment

# The log of a mass of zero: smaller than that of any other mass.
LOG_NOTHING = -1e30
# Settings of Adam in the published router, which uses it on the semi-dual:
# learning rate, betas, epsilon, and the gradient norm at which it stops.
ADAM_RATE, ADAM_BETAS, ADAM_EPS, ADAM_STOP = 1e-2, (0.9, 0.999), 1e-8, 1e-3
# A plan whose marginals are off by more than this did not converge.
TOLERANCE = 1e-4
NEWTON_STEPS = 30
# NEVER masks a pair of token and expert: it is less than any similarity plus
# dual variable. FIRST, added to a pair, puts it before all others: it is more
# than any difference of two such sums. Both are no larger than needed, because
# float32 would round the similarities away beside a larger number.
NEVER = -1e4
FIRST = 1e2


def sinkhorn(logits_GSE: Tensor, iterations: int = 20,
             valid_GS: Tensor | None = None) -> Tensor:
    """(G, S, E), the entropic plan, argmax <T, L> + H(T), of each group.

    It maximises the fit of the plan T to the logits L plus the entropy of T.
    The method scales experts to their share and tokens to theirs by turns
    (2401.15969, with epsilon 1), a fixed number of times. It works on
    logarithms, so that logits of any size are safe. Tokens are scaled last:
    their sums are exact, those of experts nearly so. Differentiable.

    Args:
        logits_GSE: (G, S, E) float32, L.
        iterations: how often experts and tokens are scaled.
        valid_GS: (G, S) bool, False for padded tokens, which give no mass:
            their rows in the plan are zero.
    """
    if not logits_GSE.numel():
        return logits_GSE
    # The token axis, which is long, comes last, so that sums over it run over
    # contiguous memory.
    log_plan = logits_GSE.transpose(1, 2).contiguous()
    padded = None if valid_GS is None else ~valid_GS[:, None]
    token_scale = torch.zeros_like(log_plan[:, :1])
    expert_scale = torch.zeros_like(log_plan[:, :, :1])
    for _ in range(iterations):
        given = log_plan + token_scale
        if padded is not None:
            # Not -inf, because in a group of padding alone logsumexp over
            # nothing but -inf has a gradient of nan.
            given = given.masked_fill(padded, LOG_NOTHING)
        # Experts are scaled to a sum of one instead of their share. All
        # shares are equal, so the factor cancels when tokens are scaled.
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
        error_G: (G,) the largest distance of a token's sum from its mass (one,
            or zero for padding). Experts' sums are exact up to rounding.
    """
    plan_GSE: Tensor
    error_G: Tensor

    def converged(self) -> bool:
        """Return True if the plan of every group has its marginals, up to
        ``TOLERANCE``."""
        return bool((self.error_G <= TOLERANCE).all())


SOLVERS = ('matching', 'adam')


def k_sparse_plan(similarity_GSE: Tensor, capacity_G: Tensor,
                  iterations: int = 20, solver: str = 'matching',
                  valid_GS: Tensor | None = None) -> SparsePlan:
    """Find an l2-regularised plan with at most C tokens per expert.

    The plan is argmax <T, A> - ||T||^2 / 2 under the marginals and the limit
    of C nonzero entries per expert (Sparsity-Constrained Optimal Transport,
    2209.15466). The limit makes the problem non-convex: no method finds the
    best plan in general, and with E * C < S there is no plan at all.

    The solver 'adam' is the one of the published router. It runs Adam on the
    convex semi-dual problem. There each token has a dual variable, which is
    added to its similarities, and each expert projects its C largest sums on
    the simplex; the variable of a token that got too little mass rises. The
    result is far from the tokens' marginals.

    The solver 'matching' starts from these dual variables and meets the
    marginals. Once it is decided which C tokens each expert may use (the
    support of the plan), the best plan is a convex problem, which Newton's
    method solves. Two supports are tried:

    1. The C largest entries of each expert.
    2. If these allow no plan: each token is matched with one expert by
       deferred acceptance (a stable matching), with floor(S / E) places per
       expert. The tokens left over, fewer than E, are shared out evenly, at
       most two to an expert. Each expert's remaining places, up to C, go to
       its largest entries. Now a plan exists if C >= S / E and E divides S,
       or if C >= floor(S / E) + 2.

    Args:
        similarity_GSE: (G, S, E) float32, A; the softmax of the logits.
        capacity_G: (G,) int64, C of each group, from 1 to S.
        iterations: Adam steps.
        solver: 'matching' or 'adam'.
        valid_GS: (G, S) bool, False for padded tokens, which give no mass.

    Returns:
        The plan and its distance from its marginals. A group for which no
        plan was found gets the one of 'adam'.
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
    """Replace each plan that misses its marginals by the best plan on the
    support of its group, if there is one that meets them."""
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
    """(G,), the largest distance of a token's sum from its mass."""
    return (plan_GES.sum(1) - mass_GS).abs().amax(1)


def _adam(similarity_GES: Tensor, mass_GS: Tensor, share_G: Tensor,
          capacity_G: Tensor, iterations: int) -> Tensor:
    """(G, S), the dual variable of each token after Adam's steps."""
    dual = torch.zeros_like(mass_GS)
    first, second = torch.zeros_like(dual), torch.zeros_like(dual)
    beta1, beta2 = ADAM_BETAS
    for step in range(1, iterations + 1):
        plan = _project_columns(similarity_GES + dual[:, None], share_G,
                                capacity_G)
        gradient = plan.sum(1) - mass_GS
        # A group that has converged is no longer changed while the others
        # go on, so that its result does not depend on them.
        going_G1 = (gradient.norm(dim=1) > ADAM_STOP)[:, None]
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.square()
        update = (first / (1 - beta1**step)) / (
            (second / (1 - beta2**step)).sqrt() + ADAM_EPS)
        dual = dual - ADAM_RATE * update * going_G1
    return dual


def _project_columns(raised_GES: Tensor, share_G: Tensor,
                     capacity_G: Tensor) -> Tensor:
    """(G, E, S), for each expert its C largest entries, projected on the
    simplex: the nearest masses >= 0 that sum to its share."""
    held = largest(raised_GES, capacity_G[:, None])
    return project_on_simplex(raised_GES, held, share_G[:, None])


def project_on_simplex(values: Tensor, held: Tensor, total: Tensor) -> Tensor:
    """Project on a simplex (Michelot, 1986): find the nearest point whose
    entries are >= 0, sum to ``total``, and are zero where ``held`` is False.

    Args:
        values: (..., S).
        held: (..., S) bool, True at least once in each row.
        total: broadcastable to (...).
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
    """(G, E, S) bool, C tokens of each expert, chosen so that a plan exists
    on them; step 2 of :func:`k_sparse_plan`."""
    num_experts = raised_GES.shape[1]
    places_G = torch.minimum(share_G.floor().long(), capacity_G)
    matched = deferred_acceptance(raised_GES, places_G)
    # The masses of the tokens left over are laid end to end and cut in E
    # equal pieces, one for each expert.
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
    """(..., S) bool, as :func:`rmoe.moe.assignment.largest`, with the bound
    read from ``count``, which is broadcastable to (...)."""
    most = int(count.max())
    return assignment.largest(
        values, most if int(count.min()) == most else count, most)


def deferred_acceptance(values_GES: Tensor, places_G: Tensor) -> Tensor:
    """Match tokens with experts (Gale and Shapley, 1962).

    Each token proposes to the best expert that has not rejected it yet, and
    each expert keeps the best proposals and rejects the others, until no
    expert has more tokens than places. All places are taken if there are
    enough tokens.

    Args:
        values_GES: (G, E, S), how much each expert and token suit each other;
            ``NEVER`` where they must not be matched.
        places_G: (G,) int64, places of each expert.

    Returns:
        (G, E, S) bool, at most one expert for each token, and no more tokens
        for an expert than it has places.
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
    """(G, E, S), the best plan that is zero outside ``support_GES``.

    Newton's method finds the dual variables a of tokens and b of experts for
    which T = max(A + a + b, 0) has its marginals. The Hessian is diagonal
    except for E rows, so each step only has to solve one E x E system per
    group.
    """
    # In float64 a step is accurate enough that two or three of them suffice.
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
        # Line search: halve each group's step until its value falls enough
        # (Armijo's condition).
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
