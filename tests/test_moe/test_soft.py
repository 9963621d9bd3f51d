"""Soft MoE (2308.00951) on three tokens, worked out by hand."""
import torch
from routers import D, build_layer

from rmoe.moe import SoftRouter


def worked_router() -> SoftRouter:
    # one slot for each of two experts; only directions matter
    router = SoftRouter(dim=2, num_experts=2, slots_per_expert=1)
    router.embeddings.data.copy_(torch.tensor([[[1., 0]], [[0, 2]]]))
    return router


def test_worked_example():
    # Normalised tokens (1 0), (0 1), (.7071 .7071): logits, up to the 1e-6
    # under the root, [[1 0], [0 1], [.7071 .7071]].
    # D, over tokens: exp gives 2.7183, 1, 2.0281 -> .47304 .17402 .35294.
    # W, over slots: exp(1) / (exp(1) + 1) = .73106; .5 for the third token.
    x = torch.tensor([[1., 0], [0, 1], [1, 1]])
    routing = worked_router()(x)
    torch.testing.assert_close(routing.dispatch_GSN[0], torch.tensor(
        [[.473041, .174022], [.174022, .473041], [.352937, .352937]]),
        atol=1e-6, rtol=0)
    torch.testing.assert_close(routing.combine_GSN[0], torch.tensor(
        [[.731058, .268942], [.268942, .731058], [.5, .5]]), atol=1e-6,
        rtol=0)
    # slots mix the tokens as they are, not normalised
    slots = routing.dispatch_GSN[0].t() @ x
    torch.testing.assert_close(slots, torch.tensor(
        [[.825978, .526959], [.526959, .825978]]), atol=2e-6, rtol=0)
    # experts that change nothing
    torch.testing.assert_close(routing.combine_GSN[0] @ slots, torch.tensor(
        [[.745559, .607378], [.607378, .745559], [.676468, .676468]]),
        atol=2e-6, rtol=0)


def test_loads_are_sums_of_combine_weights():
    x = torch.tensor([[1., 0]]).repeat(100, 1)
    routing = worked_router()(x)
    torch.testing.assert_close(routing.load_E, torch.tensor(
        [73.1058, 26.8942]), atol=1e-3, rtol=0)
    assert routing.counts_E.tolist() == [1, 1]
    assert routing.strongest_expert().tolist() == [0] * 100
    valid = torch.arange(100) < 50
    torch.testing.assert_close(worked_router()(x, valid).load_E,
                               torch.tensor([36.5529, 13.4471]), atol=1e-3,
                               rtol=0)


def test_more_slots_than_tokens():
    layer = build_layer(dict(type='SoftRouter', slots_per_expert=50))
    assert layer(torch.randn(2, 3, D)).isfinite().all()


def test_the_cost_follows_the_slots_whatever_the_image_size():
    layer = build_layer(dict(type='SoftRouter', slots_per_expert=5))
    for tokens in (4, 400):
        routing = layer.router(torch.randn(2 * tokens, D), None, 2)
        assert routing.counts_E.tolist() == [10] * 4
