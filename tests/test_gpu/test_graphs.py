"""CUDA graphs: what is captured once computes what is run each time."""
import pytest
import torch
from gpu_cases import (
    BACKBONES,
    PRECISIONS,
    WITHOUT_WAITING,
    build_backbone,
    build_layer,
    capture,
    loss_of,
    on,
    pictures,
    relative_error,
    tokens,
    train_pass,
)
from routers import ROUTERS

from rmoe.moe import moe_layers

pytestmark = pytest.mark.gpu
TOLERANCE = {'float32': 1e-4, 'bf16 autocast': 3e-2}
# Products may be rounded otherwise in a graph, and behind features that are a
# token here and there goes to another expert.
OF_BACKBONES = {'float32': 1e-3, 'bf16 autocast': .1}
OF_STEPS = {'float32': .1, 'bf16 autocast': .5}


@pytest.mark.parametrize('precision', TOLERANCE)
@pytest.mark.parametrize('name', WITHOUT_WAITING)
def test_layer_in_training(device, name, precision):
    case = PRECISIONS[precision]
    layer = on(device, case, build_layer(ROUTERS[name]))
    twin = on(device, case, build_layer(ROUTERS[name]))
    x, weight = tokens(64).to(device), tokens(64).to(device)
    replay = capture(lambda: train_pass(layer, x, weight, case), device)
    for shift in range(1, 4):
        # Other tokens, other loads, in the same memory.
        x.copy_(tokens(64).roll(shift, 2))
        found = replay()
        wanted = train_pass(twin, x, weight, case)
        for key, value in wanted.items():
            assert relative_error(found[key], value) <= TOLERANCE[
                precision], key


@pytest.mark.parametrize('precision', TOLERANCE)
@pytest.mark.parametrize('name', BACKBONES)
def test_backbone_in_evaluation(device, name, precision):
    case = PRECISIONS[precision]
    backbone = build_backbone(name, device).eval()
    images, = pictures(1, device)

    @torch.no_grad()
    def run():
        with case.context(device):
            return backbone(images)

    replay = capture(run, device)
    seen = []
    for batch in pictures(3, device):
        images.copy_(batch)
        found = [value.clone() for value in replay()]
        for one, other in zip(found, run(), strict=True):
            assert relative_error(one, other) <= OF_BACKBONES[precision]
        seen.append(found[-1])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize('precision', TOLERANCE)
@pytest.mark.parametrize('name', BACKBONES)
def test_training_step(device, name, precision):
    """Loss, parameters and counters after four steps. SGD keeps nothing that
    warming up would change."""
    images, = pictures(1, device)
    steps = {}
    for kind in ('graph', 'eager'):
        backbone = build_backbone(name, device)
        run = step_of(backbone, images, PRECISIONS[precision])
        start = {key: value.clone()
                 for key, value in backbone.state_dict().items()}
        steps[kind] = (backbone, capture(run, device) if kind == 'graph'
                       else run)
        backbone.load_state_dict(start)
        for layer in moe_layers(backbone).values():
            for counter in (layer.demand_E, layer.kept_E, layer.token_counts):
                counter.zero_()
    for batch in pictures(4, device):
        images.copy_(batch)
        losses = [run().clone() for _, run in steps.values()]
        assert relative_error(*losses) <= OF_BACKBONES[precision]
    (graph, _), (eager, _) = steps.values()
    moved = build_backbone(name, device).state_dict()
    for (key, found), wanted in zip(graph.state_dict().items(),
                                    eager.state_dict().values(), strict=True):
        if wanted.is_floating_point():
            step = (wanted - moved[key]).norm()
            assert (found - wanted).norm() <= (
                OF_STEPS[precision] * step + 1e-5), key
    for found, wanted in zip(moe_layers(graph).values(),
                             moe_layers(eager).values(), strict=True):
        assert found.token_counts.tolist() == wanted.token_counts.tolist()
        assert found.demand_E.sum() == wanted.demand_E.sum()


def step_of(backbone, images, precision):
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-2)

    def run() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(backbone, images, precision)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run
