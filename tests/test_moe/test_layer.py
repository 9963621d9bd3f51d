"""The layer against the per-token oracle and against the dense FFN."""
import copy
import itertools
import warnings

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from mmengine.registry import DefaultScope
from reference import mixture
from torch.utils.checkpoint import checkpoint

from rmoe.moe import MoEFFN, collect_losses
from rmoe.registry import MODELS

pytestmark = pytest.mark.usefixtures('both_paths')

D, H, E, T = 12, 20, 4, 37
ALIGNMENTS = ('stopgrad', 'straight_through', 'none', 'renormalize')


def build(randomise: bool = True, **options) -> MoEFFN:
    router = dict(type='TokenChoiceRouter', noise_std=0.,
                  **options.pop('router', {}))
    layer = MoEFFN(D, H, **{'num_experts': E, 'router': router, **options})
    if randomise:
        for name, parameter in layer.named_parameters():
            torch.nn.init.normal_(
                parameter, std=1. if name == 'router.scorer.weight' else 0.3)
    return layer


def gradients(layer, x, y):
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(
        (y * upstream).sum(), [x, *parameters.values()], allow_unused=True)
    return dict(zip(['x', *parameters], grads))


VARIANTS = [
    dict(align=align, router=dict(top_k=k, **capacity), **experts)
    for align, k, capacity, experts in itertools.product(
        ALIGNMENTS, (1, 2, 4),
        ({}, dict(capacity_factor=0.5, capacity_multiple=1),
         dict(capacity_factor=0.5, priority='bpr')),
        ({}, dict(rank=3), dict(core=False), dict(unrouted='zero')))
]


@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_equals_per_token_loop(options):
    layer = build(**copy.deepcopy(options))
    x = torch.randn(T, D, requires_grad=True)
    y = layer(x)
    expected = x + mixture(layer, x, layer.router(x))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    fast, slow = gradients(layer, x, y), gradients(layer, x, expected)
    for name in fast:
        grad = slow[name]
        if grad is None:  # e.g. an expert's core that no row touched
            grad = torch.zeros_like(fast[name])
        torch.testing.assert_close(fast[name], grad, atol=1e-5, rtol=1e-4,
                                   msg=lambda m, n=name: f'{n}: {m}')


def dense_ffn() -> FFN:
    return FFN(D, H, act_cfg=dict(type='GELU'), ffn_drop=0.)


@pytest.mark.parametrize('options', [
    dict(align=align, router=dict(top_k=k, capacity_factor=factor),
         rank=rank)
    for align in ('stopgrad', 'straight_through')
    for k in (1, 2, 4) for factor in (None, .5) for rank in (None, 3)
] + [dict(align='renormalize', router=dict(top_k=k)) for k in (1, 2)], ids=str)
def test_zero_residual_is_the_dense_ffn(options):
    layer, dense = build(randomise=False, **copy.deepcopy(options)), dense_ffn()
    missing = layer.load_state_dict(dense.state_dict(), strict=False)
    assert all('experts' in key or 'router' in key
               for key in missing.missing_keys)
    assert layer.preserves_function
    x, identity = torch.randn(2, T, D), torch.randn(2, T, D)
    assert (layer(x, identity) - dense(x, identity)).abs().max() < 1e-5
    layer.eval()
    assert (layer(x) - dense(x)).abs().max() < 1e-5


def test_core_only_is_the_dense_ffn_and_routes_nothing():
    layer, dense = build(), dense_ffn()
    layer.load_state_dict(dense.state_dict(), strict=False)
    layer.core_only = True
    x = torch.randn(T, D)
    assert torch.equal(layer(x), dense(x))
    assert layer.demand_E.sum() == 0


@pytest.mark.parametrize('align', ALIGNMENTS)
def test_one_expert_is_the_dense_ffn(align):
    layer, dense = build(num_experts=1, align=align), dense_ffn()
    layer.load_state_dict(dense.state_dict(), strict=False)
    for parameter in layer.experts.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(T, D, requires_grad=True)
    y, expected = layer(x), dense(x)
    torch.testing.assert_close(y, expected)
    fast, slow = gradients(layer, x, y), gradients(dense, x, expected)
    for name, grad in slow.items():
        torch.testing.assert_close(fast[name], grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast['experts.residual_fc1_weight'][0],
                               slow['layers.0.0.weight'], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('align', ['stopgrad', 'straight_through', 'none'])
def test_router_learns_from_the_task_alone(k, align):
    layer = build(align=align, router=dict(top_k=k, loss_weights={}))
    layer(torch.randn(T, D)).square().sum().backward()
    assert layer.router.scorer.weight.grad.norm() > 1e-3


def test_align_is_gated_backward_and_dense_scale_forward():
    # 2204.09636: forward is E(x) whatever the gate; d/d gate = <up, E(x)>,
    # d/d theta = gate * dE.
    plain, aligned = build(align='none'), build(align='stopgrad')
    aligned.load_state_dict(plain.state_dict())
    x = torch.randn(T, D)
    up = torch.randn(T, D)
    for layer in (plain, aligned):
        (layer(x) * up).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), aligned.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    gates = plain.router(x).scores_TE.amax(1, keepdim=True)
    torch.testing.assert_close(plain(x) - x, (aligned(x) - x) * gates)


def test_straight_through_passes_the_gradient_of_what_was_computed():
    """With equal experts, gradients are those of the dense FFN, whatever the
    gates are."""
    dense = dense_ffn()
    x = torch.randn(T, D, requires_grad=True)
    wanted = gradients(dense, x, dense(x))
    for align, same in (('straight_through', True), ('stopgrad', False)):
        layer = build(randomise=False, align=align, router=dict(
            top_k=2, loss_weights={}))
        layer.load_state_dict(dense.state_dict(), strict=False)
        # A router of zeros adds nothing to the gradient of x.
        torch.nn.init.zeros_(layer.router.scorer.weight)
        found = gradients(layer, x, layer(x))
        for name, grad in wanted.items():
            close = torch.allclose(found[name], grad, atol=1e-5, rtol=1e-4)
            assert close == same, name


@pytest.mark.parametrize('experts', [E, 64])
@pytest.mark.parametrize('tokens', [0, 1, 3])
def test_experts_without_tokens_are_in_the_graph(tokens, experts):
    layer = build(num_experts=experts)
    x = torch.randn(tokens, D, requires_grad=True)
    layer(x).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert layer(x).shape == x.shape


def test_evaluation_does_not_depend_on_batch_mates():
    layer = build(router=dict(top_k=2, capacity_factor=0.5)).eval()
    x = torch.randn(6, T, D)
    together = layer(x)
    order = torch.randperm(6)
    alone = torch.stack([layer(image[None])[0] for image in x])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer(x[order]), together[order], atol=1e-6,
                               rtol=1e-5)
    assert torch.equal(layer(x), together)


def test_noise_is_for_training_only():
    layer = MoEFFN(D, H, E, router=dict(type='TokenChoiceRouter',
                                        noise_std=5.))
    x = torch.randn(T, D)
    a, b = layer.router(x), layer.router(x)
    assert not torch.equal(a.scores_TE, b.scores_TE)
    assert torch.equal(a.logits_TE, b.logits_TE)
    layer.eval()
    assert torch.equal(layer.router(x).scores_TE, layer.router(x).scores_TE)


@pytest.mark.parametrize('capacity', [None, 0.5])
def test_padding_steers_nothing(capacity):
    layer = build(router=dict(top_k=2, capacity_factor=capacity,
                              capacity_multiple=1))
    x, junk = torch.randn(T, D), 9 * torch.randn(T, D)
    alone = layer.router(x).served()
    padded = layer.router(torch.cat((junk, x)),
                          torch.arange(2 * T) >= T).served()
    assert torch.equal(padded.token_ids_N - T, alone.token_ids_N)
    assert torch.equal(padded.counts_E, alone.counts_E)
    for name, loss in alone.losses.items():
        torch.testing.assert_close(padded.losses[name], loss)
    y = layer(torch.cat((junk, x)), valid=torch.arange(2 * T) >= T)
    torch.testing.assert_close(y[T:], layer(x))


@pytest.mark.parametrize('k', [1, 2])
def test_checkpointing_changes_nothing(k):
    plain = MoEFFN(D, H, E, router=dict(type='TokenChoiceRouter', top_k=k))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=.3)
    saved = copy.deepcopy(plain)
    saved.with_cp = True
    x = torch.randn(T, D, requires_grad=True)
    results = []
    for layer in (plain, saved):
        torch.manual_seed(1)
        collect_losses(layer, start=True)
        y = layer(x)
        loss = y.square().sum() + sum(
            collect_losses(layer, start=False).values())
        layer.zero_grad()
        loss.backward()
        results.append([p.grad for p in layer.parameters()])
    for a, b in zip(*results):
        assert torch.equal(a, b)
    assert torch.equal(plain.demand_E, saved.demand_E)
    assert plain.demand_E.sum() == k * T


def test_auxiliary_gradient_survives_outer_checkpointing():
    layer = build(router=dict(loss_weights=dict(importance=1.)))
    x = torch.randn(T, D, requires_grad=True)
    grads = []
    for wrap in (False, True):
        collect_losses(layer, start=True)
        y = (checkpoint(layer, x, use_reentrant=False)
             if wrap else layer(x))
        loss = 0 * y.sum() + collect_losses(layer, False)['importance']
        grads.append(torch.autograd.grad(loss, layer.router.scorer.weight)[0])
    assert grads[0].norm() > 0
    torch.testing.assert_close(*grads)


def test_router_is_float32_under_autocast():
    layer = build()
    x = torch.randn(T, D)
    plain = layer.router(x)
    with torch.autocast('cpu', torch.bfloat16):
        cast = layer.router(x)
        y = layer(x)
    assert cast.logits_TE.dtype == torch.float32
    assert torch.equal(cast.logits_TE, plain.logits_TE)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, layer(x), atol=.1, rtol=.1)
    y.sum().backward()
    assert layer.experts.residual_fc1_weight.grad.dtype == torch.float32


@pytest.mark.parametrize('options', [{}, dict(rank=3), dict(core=False)],
                         ids=str)
def test_pure_bfloat16(options):
    layer = build(**options).bfloat16()
    x = torch.randn(T, D, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_losses_are_collected_once_and_missed_with_a_warning():
    layer = build(router=dict(loss_weights=dict(gshard=2., z=1.)))
    x = torch.randn(T, D)
    with pytest.warns(UserWarning, match='rmoe.MoELossHook'):
        layer(x)
    collect_losses(layer, start=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        layer(x), layer(x)
    losses = collect_losses(layer, start=False)
    single = layer.router(x).losses
    assert set(losses) == {'gshard', 'z'}
    torch.testing.assert_close(losses['z'], 2 * single['z'])
    layer.eval()
    collect_losses(layer, start=True)
    layer(x)
    assert collect_losses(layer, start=False) == {}


def test_unified_formulation():
    # einsum over dispatch and combine tensors (2401.15969) is the layer.
    layer = build(align='none', router=dict(top_k=2))
    x = torch.randn(T, D)
    routing = layer.router(x)
    dispatch, combine = routing.dispatch_tensor(), routing.combine_tensor()
    slots = torch.einsum('tec,td->ecd', dispatch, x)
    out = layer.experts(slots.flatten(0, 1), None, layer.core)
    y = torch.einsum('tec,ecd->td', combine, out.view(slots.shape))
    torch.testing.assert_close(layer(x) - x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures('host_scope')
def test_builds_under_a_host_scope():
    layer = MODELS.build(dict(type='rmoe.MoEFFN', embed_dims=D,
                              feedforward_channels=H))
    assert layer.num_experts == 8


def test_role_is_in_the_name():
    names = {name for name, _ in build(rank=2).named_parameters()}
    core = {f'layers.{i}.{p}' for i in ('0.0', '1')
            for p in ('weight', 'bias')}
    residual = {f'experts.residual_{fc}_{p}' for fc in ('fc1', 'fc2')
                for p in ('bias', 'up', 'down')}
    assert names == core | residual | {'router.scorer.weight'}


@pytest.mark.parametrize('options, message', [
    (dict(num_experts=0), 'num_experts=0'),
    (dict(router=dict(top_k=5)), 'top_k=5'),
    (dict(router=dict(top_k=0)), 'top_k=0'),
    (dict(align='mean'), "align='mean'"),
    (dict(unrouted='drop'), "unrouted='drop'"),
    (dict(core=False, unrouted='core'), "unrouted='core' needs core=True"),
    (dict(rank=0), 'rank=0'),
    (dict(rank=2, core=False), 'rank=2 needs a core'),
    (dict(router=dict(priority='random')), "priority='random'"),
    (dict(router=dict(capacity_factor=-1.)), 'capacity_factor=-1.0'),
    (dict(router=dict(loss_weights=dict(balance=1.))), "'balance'"),
    (dict(router=dict(loss_weights=dict(load=1.))), "'load' loss"),
    (dict(router=dict(loss_weights=dict(z=-1.))), 'must not be negative'),
])
def test_bad_arguments_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_same_seed_same_result():
    with DefaultScope.overwrite_default_scope('rmoe'):
        results = []
        for _ in range(2):
            torch.manual_seed(3)
            layer = MoEFFN(D, H, E)
            results.append(layer(torch.randn(T, D)))
    assert torch.equal(*results)
