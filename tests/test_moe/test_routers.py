"""The invariants of a MoE layer, for every router."""
import copy

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from reference import mixture, soft_mixture
from routers import (
    ROUTERS,
    SPARSE,
    B,
    D,
    E,
    H,
    S,
    build_layer,
    images,
    route,
)

from rmoe.moe import collect_losses
from rmoe.moe.finite import raise_not_finite, take_not_finite
from rmoe.moe.routers.base import NotFiniteError

pytestmark = pytest.mark.usefixtures('both_paths')

every_router = pytest.mark.parametrize('name', ROUTERS)
every_sparse_router = pytest.mark.parametrize('name', SPARSE)


def gradients(layer, x, y):
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(
        (y * upstream).sum(), [x, *parameters.values()], allow_unused=True)
    return {name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip([('x', x), *parameters.items()],
                                       grads)}


def assert_gradients_equal(fast, slow):
    for name, grad in slow.items():
        torch.testing.assert_close(fast[name], grad, atol=2e-5, rtol=1e-3,
                                   msg=lambda m, n=name: f'{n}: {m}')


@every_router
@pytest.mark.parametrize('align', [None, 'none'])
def test_equals_the_per_token_loop(name, align):
    layer = build_layer(ROUTERS[name], align=align)
    x = images().requires_grad_()
    y = layer(x)
    routing = route(layer, x)
    slow = soft_mixture if layer.router.soft else mixture
    expected = x + slow(layer, x.reshape(-1, D), routing).view_as(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert_gradients_equal(gradients(layer, x, y),
                           gradients(layer, x, expected))


@every_router
def test_einsum_of_the_unified_formulation_is_the_fast_path(name):
    # 2401.15969: slots = D x, y = W experts(slots), forward and gradient
    layer = build_layer(ROUTERS[name], align='none', unrouted='zero')
    x = images().requires_grad_()
    y = layer(x)
    routing = route(layer, x)
    dispatch, combine = routing.dispatch_tensor(), routing.combine_tensor()
    assert dispatch.shape == combine.shape
    slots = torch.einsum('tec,td->ecd', dispatch, x.view(-1, D))
    out = layer.experts(slots.flatten(0, 1), None, layer.core)
    expected = x + torch.einsum('tec,ecd->td', combine,
                                out.view(slots.shape)).view_as(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert_gradients_equal(gradients(layer, x, y),
                           gradients(layer, x, expected))


@every_router
@pytest.mark.parametrize('rank', [None, 3])
def test_upcycled_is_dense(name, rank):
    layer = build_layer(ROUTERS[name], randomise=False, rank=rank)
    assert layer.preserves_function
    dense = FFN(D, H, act_cfg=dict(type='GELU'), ffn_drop=0.)
    layer.load_state_dict(dense.state_dict(), strict=False)
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    x, identity = images(), images()
    for mode in (True, False):
        layer.train(mode)
        difference = layer(x, identity) - dense(x, identity)
        assert difference.abs().max() < 1e-5


@pytest.mark.parametrize('router, options, preserves', [
    ('token choice', dict(align='none'), False),
    ('token choice', dict(unrouted='zero'), True),
    ('token choice, capacity', dict(unrouted='zero'), False),
    ('expert choice', dict(unrouted='zero'), False),
    ('expert choice', dict(align='renormalize'), True),
    ('soft', dict(align='none'), False),
    ('token choice', dict(core=False), True),
    ('expert choice', dict(core=False), False),
    ('soft', dict(core=False), False),
])
def test_the_layer_says_whether_it_preserves_the_function(router, options,
                                                          preserves):
    layer = build_layer(ROUTERS[router], randomise=False, **options).eval()
    assert layer.preserves_function == preserves
    dense = FFN(D, H, act_cfg=dict(type='GELU'), ffn_drop=0.)
    if layer.layers is None:
        state = dense.state_dict()
        for fc, key in (('fc1', 'layers.0.0'), ('fc2', 'layers.1')):
            for part in ('weight', 'bias'):
                experts = getattr(layer.experts, f'residual_{fc}_{part}')
                experts.data.copy_(state[f'{key}.{part}'].expand_as(experts))
    else:
        layer.load_state_dict(dense.state_dict(), strict=False)
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    x = images(tokens=40)
    assert ((layer(x) - dense(x)).abs().max() < 1e-5) == preserves


@every_sparse_router
def test_one_expert_is_the_dense_ffn(name):
    options = dict(SPARSE[name], **{
        key: 1 for key in ('top_k', ) if key in SPARSE[name]})
    if 'capacity_factor' in options:
        options.update(capacity_factor=1., eval_capacity_factor=1.)
    layer = build_layer(options, randomise=False, num_experts=1)
    dense = FFN(D, H, act_cfg=dict(type='GELU'))
    layer.load_state_dict(dense.state_dict(), strict=False)
    x = images().requires_grad_()
    y, expected = layer(x), dense(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    fast, slow = gradients(layer, x, y), gradients(dense, x, expected)
    if 'bias' not in name:  # a sigmoid gate of one expert is not 1
        assert_gradients_equal(fast, slow)
        torch.testing.assert_close(fast['experts.residual_fc1_weight'][0],
                                   slow['layers.0.0.weight'], atol=1e-5,
                                   rtol=1e-4)


def test_one_token_in_one_slot_of_one_expert_is_the_dense_ffn():
    layer = build_layer(dict(type='SoftRouter', slots_per_expert=1),
                        randomise=False, num_experts=1, align='none')
    dense = FFN(D, H, act_cfg=dict(type='GELU'))
    layer.load_state_dict(dense.state_dict(), strict=False)
    x = images(tokens=1).requires_grad_()
    y, expected = layer(x), dense(x)
    torch.testing.assert_close(y, expected)
    assert_gradients_equal(gradients(layer, x, y),
                           gradients(dense, x, expected))


@every_router
def test_router_learns_from_the_task_alone(name):
    layer = build_layer(ROUTERS[name])
    layer(images()).square().sum().backward()
    for parameter in layer.router.parameters():
        assert parameter.grad.norm() > 1e-4


def test_a_soft_router_learns_after_the_first_step_of_the_residuals():
    # With align='difference' and zero residuals, the gradient of the router
    # is zero in the first step.
    layer = build_layer(ROUTERS['soft'], randomise=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x = images()
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        norms.append(float(layer.router.embeddings.grad.norm()))
        optimizer.step()
    assert norms[0] < 1e-7 < norms[1]


@every_router
def test_checkpointing_changes_nothing(name):
    plain = build_layer(ROUTERS[name])
    saved = copy.deepcopy(plain)
    saved.with_cp = True
    x = images().requires_grad_()
    results = []
    for layer in (plain, saved):
        collect_losses(layer, start=True)
        loss = layer(x).square().sum() + sum(
            collect_losses(layer, start=False).values())
        loss.backward()
        results.append([p.grad for p in layer.parameters()])
    for a, b in zip(*results):
        assert torch.equal(a, b)
    for a, b in zip(plain.buffers(), saved.buffers()):
        assert torch.equal(a, b)


@every_router
@pytest.mark.parametrize('experts', [E, 32])
@pytest.mark.parametrize('tokens', [0, 1, 3])
def test_few_tokens_break_nothing(name, experts, tokens):
    layer = build_layer(ROUTERS[name], num_experts=experts)
    for shape in ((2, tokens), (0, tokens), (tokens, )):
        for valid in (None, torch.ones(shape, dtype=torch.bool)):
            x = torch.randn(*shape, D, requires_grad=True)
            layer.zero_grad()
            y = layer(x, valid=valid)
            assert y.shape == x.shape and y.isfinite().all()
            y.sum().backward()
            for parameter_name, parameter in layer.named_parameters():
                assert parameter.grad is not None, parameter_name
                assert parameter.grad.isfinite().all(), parameter_name


@every_router
def test_evaluation_does_not_depend_on_batch_mates(name):
    layer = build_layer(ROUTERS[name]).eval()
    x = images(6)
    together = layer(x)
    alone = torch.cat([layer(image[None]) for image in x])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    order = torch.randperm(6)
    torch.testing.assert_close(layer(x[order]), together[order], atol=1e-6,
                               rtol=1e-5)
    assert torch.equal(layer(x), together)


@every_router
def test_padding_steers_nothing(name):
    layer = build_layer(ROUTERS[name])
    x, junk = images(), 9 * images(tokens=4)
    padded = torch.cat((junk[:, :2], x, junk[:, 2:]), 1)
    valid = torch.zeros(B, S + 4, dtype=torch.bool)
    valid[:, 2:-2] = True
    for mode in (True, False):
        layer.train(mode)
        expected = layer(x)
        counted = layer.demand_E.clone(), layer.token_counts.clone()
        found = layer(padded, valid=valid)[:, 2:-2]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        if mode:  # the second call doubled the counts
            torch.testing.assert_close(layer.demand_E, 2 * counted[0])
            assert torch.equal(layer.token_counts, 2 * counted[1])
    alone, among = route(layer, x), route(layer, padded, valid.flatten())
    for loss in alone.losses:
        torch.testing.assert_close(among.losses[loss], alone.losses[loss])


@every_router
def test_an_image_of_padding_alone_is_harmless(name):
    layer = build_layer(ROUTERS[name])
    x = images().requires_grad_()
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1] = False
    y = layer(x, valid=valid)
    torch.testing.assert_close(y[[0, 2]], layer(x[[0, 2]]), atol=1e-5,
                               rtol=1e-4)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@every_router
def test_padding_changes_no_gradient(name):
    layer = build_layer(ROUTERS[name])
    x, junk = images(), 9 * images(tokens=4)
    grads = []
    for padded in (False, True):
        layer.zero_grad()
        tokens = torch.cat((x, junk), 1) if padded else x
        valid = torch.arange(tokens.shape[1]).expand(B, -1) < S
        y = layer(tokens, valid=valid if padded else None)
        y[:, :S].square().sum().backward()
        grads.append({n: p.grad for n, p in layer.named_parameters()})
    assert_gradients_equal(*grads)


@every_router
def test_float32_under_autocast(name):
    layer = build_layer(ROUTERS[name])
    x = images()
    plain = route(layer, x)
    with torch.autocast('cpu', torch.bfloat16):
        cast = route(layer, x)
        y = layer(x)
    assert torch.equal(cast.combine_tensor(), plain.combine_tensor())
    assert cast.combine_tensor().dtype == torch.float32
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, layer(x), atol=.2, rtol=.1)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@every_router
def test_pure_bfloat16(name):
    layer = build_layer(ROUTERS[name]).bfloat16()
    y = layer(images().bfloat16())
    assert y.dtype == torch.bfloat16
    assert layer.demand_E.dtype == torch.int64
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@every_router
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_numbers_that_are_not_finite_name_the_layer(name, bad, both_paths):
    layer = build_layer(ROUTERS[name])
    layer.name = 'MoE layer of stage 2, block 1'
    x = images()
    x[1, 4, 0] = bad
    # An accelerator counts the tokens, for Soft MoE in two places, and the
    # count is read later.
    with pytest.raises(NotFiniteError, match=(
            r'stage 2, block 1: .* nan or inf for ' + (
                '[12] tokens' if both_paths else '1 of 30'))):
        layer(x)
        raise_not_finite(layer, take_not_finite(layer))
    assert not take_not_finite(layer).any()
    # Padding may hold any value.
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, 4] = False
    y = layer(x, valid=valid)
    assert y[valid].isfinite().all()
    y[valid].sum().backward()
    for parameter in layer.router.parameters():
        assert parameter.grad.isfinite().all()


@every_router
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_where_other_ranks_would_wait_they_are_counted(name, bad):
    """The layer then finishes forward and backward, on the CPU too."""
    layer = build_layer(ROUTERS[name])
    layer.router.raises_at_once = False
    x = images()
    x[1, 4, 0] = bad
    for _ in range(2):
        layer(x).sum().backward()
        counts = take_not_finite(layer)
        assert 1 <= int(counts) <= 2  # Soft MoE counts in two places
    with pytest.raises(NotFiniteError, match='tokens on rank 1: the'):
        raise_not_finite(layer, torch.stack([torch.zeros_like(counts),
                                             counts]))


# Bias-balanced routers are left out: tokens do not compete in them.
@pytest.mark.parametrize('name', [name for name in ROUTERS
                                  if 'bias' not in name])
@pytest.mark.parametrize('group', ['batch', 2, 'image'])
def test_groups_couple_their_own_images_only(name, group):
    layer = build_layer(dict(ROUTERS[name], group=group))
    x = images(4)
    size = {'batch': 4, 'image': 1}.get(group, group)
    together = layer(x)
    apart = torch.cat([layer(part) for part in x.split(size)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('name', ['token choice, capacity', 'soft',
                                  'expert choice', 'sparse expert choice'])
def test_groups_that_do_not_divide_the_batch(name):
    layer = build_layer(dict(ROUTERS[name], group=2))
    with pytest.raises(ValueError, match='group=2 images do not divide a '
                       r'batch of 3: set router\.group'):
        layer(images(3))
    layer.eval()(images(3))  # by the image, unless eval_group says else
    layer.router.eval_group = 2
    with pytest.raises(ValueError, match=r'set router\.eval_group'):
        layer(images(3))


@every_router
def test_constant_logits_are_decided_alike(name):
    # a router of zeros: all experts and all tokens tie
    layer = build_layer(ROUTERS[name])
    for parameter in layer.router.parameters():
        torch.nn.init.zeros_(parameter)
    x = images()
    first, again = route(layer, x), route(layer, torch.randn_like(x))
    assert torch.equal(first.dispatch_tensor(), again.dispatch_tensor())
    if layer.router.soft:
        assert (first.dispatch_GSN - 1 / S).abs().max() < 1e-7
    elif 'sparse' not in name:
        # the lowest indices win
        assert first.token_ids_N[0] == 0 and first.expert_ids_N[0] == 0
        assert first.token_ids_N.view(-1)[:2].tolist() == [0, 1]


@every_router
def test_same_seed_same_result(name):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        layer = build_layer(ROUTERS[name], randomise=False)
        results.append(layer(images()))
    assert torch.equal(*results)


@every_router
def test_statistics_of_a_training_pass(name):
    layer = build_layer(ROUTERS[name])
    x = images()
    routing = route(layer, x)
    layer(x)
    assert torch.equal(layer.demand_E, routing.demand_E.round().long())
    assert torch.equal(layer.kept_E, routing.load_E.round().long())
    unrouted = int((routing.kept_per_token() == 0).sum())
    assert layer.token_counts.tolist() == [B * S, unrouted]
    strongest = routing.strongest_expert()
    gates = routing.combine_tensor().sum(2)
    expected = gates.argmax(1).masked_fill(gates.sum(1) == 0, -1)
    assert torch.equal(strongest, expected)
    layer.eval()(x)
    assert layer.token_counts.tolist() == [B * S, unrouted]
