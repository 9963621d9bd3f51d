"""Transport plans: worked examples, their marginals, hard numbers."""
import pytest
import torch

from rmoe.moe import assignment, transport
from rmoe.moe.transport import (
    deferred_acceptance,
    k_sparse_plan,
    project_on_simplex,
    sinkhorn,
)

L = torch.tensor([[2., 0, 0], [1.5, 0, 0], [1, 1, 0], [.5, 0, .2]])


def test_one_sinkhorn_iteration_by_hand():
    # Columns of exp(L) sum to e^2 + e^1.5 + e + e^.5 = 16.2378,
    # 3 + e = 5.7183 and 3 + e^.2 = 4.2214. Scaled to 4/3 each, the first row
    # is .60674, .23317, .31585; divided by its sum: .52497 .20175 .27328.
    row = sinkhorn(L[None], iterations=1)[0, 0]
    torch.testing.assert_close(row, torch.tensor([.52497, .201746, .273284]),
                               atol=1e-5, rtol=0)


def test_twenty_sinkhorn_iterations():
    # The same alternation carried on, columns first; experts have 4/3.
    expected = torch.tensor([[.537311, .204572, .258117],
                             [.413266, .259417, .327316],
                             [.195347, .549563, .255089],
                             [.187409, .319781, .492811]])
    plan = sinkhorn(L[None])[0]
    torch.testing.assert_close(plan, expected, atol=2e-6, rtol=0)


def test_who_goes_where_by_softmax_and_by_sinkhorn():
    softmax, plan = L.softmax(1), sinkhorn(L[None])[0]
    # softmax: all to expert 0 (the third is a tie of 0 and 1)
    assert assignment.top_k(softmax, 1).flatten().tolist() == [0, 0, 0, 0]
    assert assignment.top_k(plan, 1).flatten().tolist() == [0, 0, 1, 2]
    for scores, expected in (
            (softmax, [(0, 0), (1, 0), (2, 1), (3, 1), (2, 2), (3, 2)]),
            (plan, [(0, 0), (1, 0), (2, 1), (3, 1), (1, 2), (3, 2)])):
        rows, _ = assignment.choose_tokens(scores[None], 2, 2)
        assert list(zip(rows.token_ids_N.tolist(),
                        rows.expert_ids_N.tolist())) == expected


def test_constant_logits_give_the_uniform_plan():
    # each of five tokens gives 1/4 to each of four experts
    for plan in (sinkhorn(torch.zeros(1, 5, 4)),
                 k_sparse_plan(torch.full((1, 5, 4), .25), torch.tensor([5])
                               ).plan_GSE):
        torch.testing.assert_close(plan, torch.full((1, 5, 4), .25))


@pytest.mark.parametrize('scale', [1., 10., 100.])
def test_sinkhorn_of_large_logits(scale):
    logits = scale * (2 * torch.rand(2, 64, 8) - 1)
    plan = sinkhorn(logits)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(2), torch.ones(2, 64))
    torch.testing.assert_close(plan, sinkhorn(logits.double()).float(),
                               atol=1e-4, rtol=1e-3)
    if scale == 1:  # experts' sums are nearly exact
        assert (plan.sum(1) - 8).abs().max() < 1e-3


def test_sinkhorn_where_every_token_wants_the_same_expert():
    logits = torch.zeros(1, 16, 4)
    logits[..., 2] = 100
    plan = sinkhorn(logits)
    torch.testing.assert_close(plan, torch.full_like(plan, .25), atol=1e-4,
                               rtol=0)


def test_sinkhorn_in_the_log_domain_is_the_textbook_one():
    logits = torch.randn(3, 20, 5)
    kernel = logits.exp()
    u = torch.ones(3, 20, 1)
    for _ in range(20):
        v = 4 / (kernel * u).sum(1, keepdim=True)
        u = 1 / (kernel * v).sum(2, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits), u * kernel * v, atol=1e-6,
                               rtol=1e-5)


def test_sinkhorn_is_differentiable():
    logits = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 5), (logits, ))


def test_project_on_simplex_of_the_k_largest():
    # of (.5 .4 .3 -.2) the two largest; threshold (.9 - 1) / 2 = -.05
    values = torch.tensor([.5, .4, .3, -.2])
    held = assignment.largest(values, 2, 2)
    projected = project_on_simplex(values, held, torch.tensor(1.))
    torch.testing.assert_close(projected, torch.tensor([.55, .45, 0, 0]))
    # all four: (.5 .4 .3) are above (1.2 - 1) / 3 = .0667
    projected = project_on_simplex(values, torch.ones(4, dtype=torch.bool),
                                   torch.tensor(1.))
    torch.testing.assert_close(
        projected, torch.tensor([.43333, .33333, .23333, 0]), atol=1e-5,
        rtol=0)


def test_the_reference_recipe_of_the_sparse_plan():
    # Adam (1e-2, .9, .999, 1e-8), 20 steps from 0, on A = softmax(L), C = 2,
    # experts' share 4/3. The first step: each column's two largest projected
    # on the simplex of 4/3, e.g. e0 from A = .7870, .6914: both minus
    # (1.4784 - 1.3333) / 2 = .0725 give .7145, .6188. Adam's first step is
    # -.01 * sign(row sum - 1); 19 more give the dual variables .062015,
    # .011425, .016515, -.076138 and this plan.
    found = k_sparse_plan(L.softmax(1)[None], torch.tensor([2]),
                          solver='adam')
    expected = torch.tensor([[.739735, 0, 0], [.593598, 0, 0],
                             [0, .794958, .632876], [0, .538375, .700458]])
    torch.testing.assert_close(found.plan_GSE[0], expected, atol=2e-6, rtol=0)
    dual = transport._adam(L.softmax(1).t()[None], torch.ones(1, 4),
                           torch.tensor([4 / 3]), torch.tensor([2]), 20)
    torch.testing.assert_close(dual[0], torch.tensor(
        [.062015, .011425, .016515, -.076138]), atol=2e-6, rtol=0)
    # rows sum to .740, .594, 1.428, 1.239: the third is off by most
    assert found.error_G.item() == pytest.approx(.427834, abs=1e-5)
    assert not found.converged()


def test_the_first_step_of_the_recipe():
    found = k_sparse_plan(L.softmax(1)[None], torch.tensor([2]), 1, 'adam')
    # rows 0 and 1 have .7145 and .6188, less than 1; rows 2 and 3 more
    dual = torch.tensor([.01, .01, -.01, -.01])
    raised = L.softmax(1) + dual[:, None]
    a, b = raised[0, 0], raised[1, 0]
    threshold = (a + b - 4 / 3) / 2
    torch.testing.assert_close(found.plan_GSE[0, :2, 0],
                               torch.stack((a, b)) - threshold)


# cf = 1 leaves no room, 100 and 30 are no multiples of 8
@pytest.mark.parametrize('tokens, factor', [
    (64, 1.), (64, 1.25), (64, 2.), (64, 8.), (100, 1.25), (100, 2.),
    (30, 2.), (8, 1.), (5, 4.)])
@pytest.mark.parametrize('scale', [0., .1, 1., 10.])
def test_matching_meets_all_constraints(tokens, factor, scale):
    similarity = (scale * torch.randn(3, tokens, 8)).softmax(2)
    capacity = min(tokens, -(-int(tokens * factor) // 8))
    found = k_sparse_plan(similarity, torch.full((3, ), capacity))
    assert found.converged()
    plan = found.plan_GSE
    assert plan.min() >= 0
    assert ((plan > 0).sum(1) <= capacity).all()
    torch.testing.assert_close(plan.sum(2), torch.ones(3, tokens), atol=1e-4,
                               rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((3, 8), tokens / 8),
                               atol=1e-3, rtol=0)


def test_matching_without_a_limit_is_the_best_plan():
    # With C = S the problem is convex: the plan is the projection of A on
    # the transport polytope, found here by Dykstra's alternating projections.
    similarity = torch.randn(1, 12, 4).softmax(2)
    found = k_sparse_plan(similarity, torch.tensor([12])).plan_GSE[0]
    x = similarity[0].double()
    p, q = torch.zeros_like(x), torch.zeros_like(x)
    everything = torch.ones_like(x, dtype=torch.bool)
    for _ in range(2000):
        y = project_on_simplex(x + p, everything, torch.tensor(1.))
        p = x + p - y
        x = project_on_simplex((y + q).t().contiguous(),
                               everything.t(), torch.tensor(3.)).t()
        q = y + q - x
    torch.testing.assert_close(found.double(), x, atol=1e-5, rtol=0)


def test_matching_is_no_worse_than_other_plans_on_its_places():
    similarity = torch.randn(1, 32, 4).softmax(2)
    plan = k_sparse_plan(similarity, torch.tensor([16])).plan_GSE[0]

    def value(t):
        return float((t * similarity[0] - t.square() / 2).sum())

    # move mass around a cycle of two tokens and two experts that hold both
    tried = 0
    for i in range(32):
        for j in range(i):
            for a in range(4):
                for b in range(a):
                    cycle = plan[[i, j]][:, [a, b]]
                    if (cycle > 1e-3).all():
                        tried += 1
                        for step in (1e-3, -1e-3):
                            other = plan.clone()
                            other[[i, i, j, j], [a, b, a, b]] += torch.tensor(
                                [step, -step, -step, step])
                            assert value(other) <= value(plan) + 1e-6
    assert tried > 10


def test_deferred_acceptance_is_stable():
    # Gale and Shapley: no token and expert would rather have each other.
    values = torch.rand(2, 4, 20)
    places = torch.tensor([5, 3])
    matched = deferred_acceptance(values, places)
    assert matched.sum(1).max() == 1
    for group, count in enumerate(places.tolist()):
        assert (matched[group].sum(1) == count).all()
        for expert in range(4):
            worst = values[group, expert][matched[group, expert]].min()
            for token in range(20):
                own = (values[group, :, token] * matched[group, :, token]
                       ).sum()
                wants = values[group, expert, token] > own
                wanted = values[group, expert, token] > worst
                assert not (wants and wanted)


def test_a_plan_that_cannot_be_is_reported():
    similarity = torch.randn(2, 64, 8).softmax(2)
    found = k_sparse_plan(similarity, torch.tensor([4, 16]))
    assert not found.converged()
    assert found.error_G[0] > .1 and found.error_G[1] < 1e-4
    # what is given instead: Adam's plan
    recipe = k_sparse_plan(similarity, torch.tensor([4, 16]), solver='adam')
    torch.testing.assert_close(found.plan_GSE[0], recipe.plan_GSE[0])


def test_padding_gives_nothing_to_a_plan():
    logits = torch.randn(3, 20, 4)
    valid = torch.rand(3, 20) > .3
    capacity = (valid.sum(1) / 2).ceil().long()
    plan = sinkhorn(logits, valid_GS=valid)
    sparse = k_sparse_plan(logits.softmax(2), capacity, valid_GS=valid)
    assert (plan[~valid] == 0).all() and (sparse.plan_GSE[~valid] == 0).all()
    for group in range(3):
        alone = logits[group][valid[group]][None]
        torch.testing.assert_close(plan[group][valid[group]],
                                   sinkhorn(alone)[0])
        torch.testing.assert_close(
            sparse.plan_GSE[group][valid[group]],
            k_sparse_plan(alone.softmax(2), capacity[group:group + 1]
                          ).plan_GSE[0], atol=1e-5, rtol=1e-4)
