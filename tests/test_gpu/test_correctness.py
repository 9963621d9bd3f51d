"""Forward and every gradient are those of float32 on the CPU."""
import pytest
import torch
from gpu_cases import (
    DEVICE,
    EXPERTS,
    FLOAT32,
    PRECISIONS,
    WIDTHS,
    build_backbone,
    build_layer,
    loss_of,
    on,
    padding,
    pictures,
    relative_error,
    tokens,
    train_pass,
)
from routers import ROUTERS

pytestmark = pytest.mark.gpu
COUNTERS = ('demand', 'kept', 'tokens')


def assert_close(found, wanted, case):
    """Relative errors are within the tolerance of a precision.

    The gradient of a router's scale is a sum of terms that cancel. Where they
    are rounded it is measured by the router's whole gradient.
    """
    assert found.keys() == wanted.keys()
    of_router = float(sum(
        value.square().sum() for name, value in wanted.items()
        if name.startswith('gradient of router'))**.5)
    wrong = {}
    for name, value in wanted.items():
        if name in COUNTERS:
            assert found[name].tolist() == value.tolist(), name
            continue
        error = relative_error(found[name], value)
        if case is not FLOAT32 and value.numel() == 1 and (
                name.startswith('gradient')):
            error = abs(float(found[name]) - float(value)) / of_router
        if not error <= case.tolerance:
            wrong[name] = error
    assert not wrong


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('kind', EXPERTS)
@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('name', ROUTERS)
def test_layer(device, name, precision, kind, padded):
    assert_layer(device, name, precision, kind, padded, 'aligned')


@pytest.mark.parametrize('kind', EXPERTS)
@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('name', ['token choice k=2', 'expert choice', 'soft'])
def test_odd_widths(device, name, precision, kind):
    assert_layer(device, name, precision, kind, True, 'odd')


def assert_layer(device, name, precision, kind, padded, widths):
    case = PRECISIONS[precision]
    layer = build_layer(ROUTERS[name], WIDTHS[widths], **EXPERTS[kind])
    # Rounded as the case has it: routers then see the same numbers.
    exact = on('cpu', case, layer).float()
    x = tokens(WIDTHS[widths][0]).to(case.pure)
    weight = tokens(WIDTHS[widths][0]).flip(1)
    valid = padding() if padded else None
    wanted = train_pass(exact, x.float(), weight, FLOAT32, valid)
    layer = on(device, case, layer)
    found = train_pass(layer, x.to(device), weight.to(device), case,
                       None if valid is None else valid.to(device))
    assert_close(found, wanted, case)
    for parameter in layer.parameters():
        assert parameter.grad is None or parameter.grad.dtype == case.pure
    layer.eval()
    exact.eval()
    with torch.no_grad():
        wanted = exact(x.float(), valid=valid)
        with case.context(device):
            found = layer(x.to(device), valid=None if valid is None
                          else valid.to(device))
    assert found.dtype == x.dtype
    assert relative_error(found, wanted) <= case.tolerance


@pytest.mark.parametrize('rows', [[0, 0, 96, 0], [1, 0, 94, 1]])
@pytest.mark.parametrize('kind', EXPERTS)
@pytest.mark.parametrize('precision', PRECISIONS)
def test_unequal_loads(device, precision, kind, rows):
    """Experts without rows, whatever a grouped product leaves there."""
    case = PRECISIONS[precision]
    layer = build_layer(ROUTERS['token choice'], **EXPERTS[kind])
    chosen = torch.arange(4).repeat_interleave(torch.tensor(rows)).view(3, 32)
    with torch.no_grad():
        layer.router.scorer.weight.copy_(8 * torch.eye(4, 64))
    x = tokens(64)
    x[..., :4] = torch.nn.functional.one_hot(chosen, 4)
    weight = tokens(64).flip(1)
    x = x.to(case.pure)
    wanted = train_pass(on('cpu', case, layer).float(), x.float(), weight,
                        FLOAT32)
    found = train_pass(on(device, case, layer), x.to(device),
                       weight.to(device), case)
    assert found['kept'].tolist() == rows
    assert_close(found, wanted, case)
    for name, value in found.items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('name', ROUTERS)
def test_no_tokens(device, name, precision):
    case = PRECISIONS[precision]
    layer = on(device, case, build_layer(ROUTERS[name]))
    x = torch.zeros(0, 8, 64, device=device, dtype=case.pure)
    found = train_pass(layer, x, torch.zeros(0, 8, 64, device=device), case)
    assert found['y'].shape == x.shape
    for name, value in found.items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize('name', ['Swin', 'CvT', 'ViT'])
def test_backbone(device, name):
    """In float32; in others it routes features that are rounded already."""
    results = []
    for where in ('cpu', device):
        backbone = build_backbone(name, where)
        images, = pictures(1, where)
        loss = loss_of(backbone, images, FLOAT32)
        loss.backward()
        results.append({
            name: parameter.grad.cpu() for name, parameter
            in backbone.named_parameters() if parameter.grad is not None}
            | {'loss': loss.detach().cpu()})
    wanted, found = results
    assert found.keys() == wanted.keys()
    # Some gradients are zero but for rounding: those of keys' biases.
    largest = max(value.norm() for value in wanted.values())
    for name, value in wanted.items():
        difference = (found[name] - value).norm()
        assert difference <= 1e-3 * value.norm() + 1e-5 * largest, name


def test_the_suite_is_on_the_device(device):
    x = torch.ones(1, device=device)
    assert x.device.type == DEVICE == device
