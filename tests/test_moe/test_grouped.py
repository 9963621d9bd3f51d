"""Grouped layers against autograd over a plain loop."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rmoe.moe.grouped import GroupedFFN, GroupedLinear

D, H = 12, 20
# 70 and 45 rows are numbers that pad_rows rounds up.
COUNTS = {'even': [6, 6, 6], 'holes': [0, 45, 0, 70, 1], 'none': [0, 0]}
KINDS = {'plain': dict(core=False), 'full': {}, 'rank': dict(rank=3),
         'no bias': dict(bias=False)}


def parameters(num_experts, out_dim, in_dim, core=True, rank=None, bias=True):
    """A layer's core weight and bias, residual bias and residual weights."""
    def random(*shape):
        return torch.randn(shape, dtype=torch.float64).mul_(
            .3).float().requires_grad_()

    residual = ([random(num_experts, out_dim, in_dim)] if rank is None else
                [random(num_experts, out_dim, rank),
                 random(num_experts, rank, in_dim)])
    return [random(out_dim, in_dim) if core else None,
            random(out_dim) if core and bias else None,
            random(num_experts, out_dim) if bias else None, *residual]


def loop(rows, counts, layer):
    """The same layer by plain operations, with core + residual of each
    expert."""
    core, core_bias, bias, *residual = layer
    weight = residual[0] if len(residual) == 1 else residual[0] @ residual[1]
    if core is not None:
        weight = weight + core
    if core_bias is not None:
        bias = bias + core_bias
    return torch.cat([
        F.linear(part, weight[expert], None if bias is None else bias[expert])
        for expert, part in enumerate(rows.split(counts))])


def check(function, expected, inputs):
    """Compare outputs, and the gradients of all inputs."""
    grad = torch.randn_like(expected())
    for compute in (expected, function):
        for tensor in inputs:
            tensor.grad = None
        out = compute()
        out.backward(grad)
        found = [out.detach()] + [tensor.grad for tensor in inputs]
        if compute is expected:
            wanted = found
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize('counts', COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_linear_is_the_loop(kind, counts):
    layer = parameters(len(counts), H, D, **kind)
    rows = torch.randn(sum(counts), D, requires_grad=True)
    check(lambda: GroupedLinear.apply(rows, counts, *layer),
          lambda: loop(rows, counts, layer),
          [rows] + [part for part in layer if part is not None])


@pytest.mark.parametrize('act', [nn.GELU(), nn.SiLU(), nn.Identity()], ids=str)
@pytest.mark.parametrize('counts', COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_ffn_is_the_loop(kind, counts, act):
    layers = [parameters(len(counts), *shape, **kind)
              for shape in ((H, D), (D, H))]
    rows = torch.randn(sum(counts), D, requires_grad=True)
    check(lambda: GroupedFFN.apply(rows, counts, act, *layers[0], *layers[1]),
          lambda: loop(act(loop(rows, counts, layers[0])), counts, layers[1]),
          [rows] + [part for layer in layers for part in layer
                    if part is not None])


@pytest.mark.parametrize('frozen', ['rows', 'core', 'residual', 'biases'])
@pytest.mark.parametrize('rank', [None, 3])
def test_frozen_parts_get_no_gradient_and_the_others_theirs(rank, frozen):
    counts = COUNTS['holes']
    layers = [parameters(len(counts), *shape, rank=rank)
              for shape in ((H, D), (D, H))]
    rows = torch.randn(sum(counts), D, requires_grad=True)
    still = {'rows': [rows],
             'core': [layer[0] for layer in layers],
             'residual': [part for layer in layers for part in layer[3:]],
             'biases': [part for layer in layers for part in layer[1:3]],
             }[frozen]
    for part in still:
        part.requires_grad_(False)
    moving = [part for part in [rows, *layers[0], *layers[1]]
              if part.requires_grad]
    act = nn.GELU()
    check(lambda: GroupedFFN.apply(rows, counts, act, *layers[0], *layers[1]),
          lambda: loop(act(loop(rows, counts, layers[0])), counts, layers[1]),
          moving)
    assert all(part.grad is None for part in still)


@pytest.mark.parametrize('rank', [None, 3])
def test_bfloat16_rows_meet_float32_parameters(rank):
    counts = [5, 0, 40]
    layers = [parameters(len(counts), *shape, rank=rank)
              for shape in ((H, D), (D, H))]
    rows = torch.randn(sum(counts), D).bfloat16()
    out = GroupedFFN.apply(rows, counts, nn.GELU(), *layers[0], *layers[1])
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    wanted = loop(F.gelu(loop(rows.float(), counts, layers[0])), counts,
                  layers[1])
    torch.testing.assert_close(out.float(), wanted, atol=.2, rtol=.05)
    for part in layers[0]:
        exact, = torch.autograd.grad(wanted.sum(), part, retain_graph=True)
        assert part.grad.dtype == torch.float32
        assert (part.grad - exact).norm() < .03 * exact.norm()


def test_activations_are_not_kept_twice():
    """Only the rows and the inputs of the activation are kept for
    backward."""
    counts = [8, 8]
    layers = [parameters(2, *shape) for shape in ((H, D), (D, H))]
    rows = torch.randn(16, D, requires_grad=True)
    kept = []
    own = {id(part) for part in [rows, *layers[0], *layers[1]]}

    def pack(tensor):
        if id(tensor) not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        GroupedFFN.apply(rows, counts, nn.GELU(), *layers[0], *layers[1])
    assert sum(kept) == 16 * H
