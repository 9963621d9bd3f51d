"""torch.compile with inductor, in training: one graph, equal results."""
import pytest
import torch
from gpu_cases import (
    BACKBONES,
    PRECISIONS,
    build_backbone,
    loss_of,
    pictures,
)

# A compilation takes up to a minute.
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.torch('2.9'),
              pytest.mark.timeout(240)]
# Of each parameter's gradient in float32. In bfloat16 inductor rounds less
# often, features differ, and a token here and there goes to another expert:
# what is compared is the gradient as a whole.
TOLERANCE = {'float32': 1e-3, 'bf16 autocast': .3}


@pytest.mark.parametrize('name, precision', [
    *((name, 'float32') for name in BACKBONES), ('Swin', 'bf16 autocast')])
def test_training(device, name, precision):
    case = PRECISIONS[precision]
    torch._dynamo.reset()
    plain = build_backbone(name, device)
    compiled = build_backbone(name, device)
    compiled.compile(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for images in pictures(3, device):
            losses = []
            for backbone in (compiled, plain):
                backbone.zero_grad(set_to_none=True)
                loss = loss_of(backbone, images, case)
                loss.backward()
                losses.append(loss.detach())
            torch.testing.assert_close(*losses, rtol=.02, atol=0)
            assert_gradients(compiled, plain, precision)


def assert_gradients(found, wanted, precision):
    tolerance = TOLERANCE[precision]
    pairs = {key: (one.grad, other.grad) for (key, one), other in zip(
        found.named_parameters(), wanted.parameters(), strict=True)
        if other.grad is not None}
    if precision != 'float32':
        one, other = (torch.cat([pair[i].flatten() for pair in pairs.values()])
                      for i in (0, 1))
        pairs = {'all': (one, other)}
    # Some are zero but for rounding: those of keys' biases.
    largest = max(other.norm() for _, other in pairs.values())
    for key, (one, other) in pairs.items():
        assert (one - other).norm() <= (
            tolerance * other.norm() + .01 * tolerance * largest), key
