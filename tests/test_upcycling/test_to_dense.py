"""MoE weights into dense ones, and into another number of experts."""
import pytest
import torch
from routers import ROUTERS
from torch import nn

from rmoe.backbones import ViTMoE
from rmoe.moe import moe_layers
from rmoe.upcycling import fit, to_dense

VIT = dict(embed_dims=24, num_layers=2, num_heads=2, mlp_dims=48, img_size=32,
           patch_size=8)
TOKEN_CHOICE = dict(type='TokenChoiceRouter', noise_std=0.)
LAYER = 'layers.1.ffn'
WAYS = ('layers.0.0', 'fc1'), ('layers.1', 'fc2')


def vit(num_experts=4, router=None, **options):
    """With random weights, so that no expert is like another."""
    model = ViTMoE(**VIT, moe=dict(
        layers=(1, ), num_experts=num_experts, router=router or TOKEN_CHOICE,
        **options)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.1)
    return model


def whole_experts(model, linear, part):
    layer = moe_layers(model)[LAYER]
    stacked = (layer.experts.residual_weight(linear) if part == 'weight' else
               getattr(layer.experts, f'residual_{linear}_{part}'))
    core = layer.core
    return stacked + (getattr(core, part)(linear) if core else 0)


@pytest.mark.parametrize('options', [{}, dict(core=False), dict(rank=3)],
                         ids=str)
@pytest.mark.parametrize('how, share', [
    ('mean', [.5, 0., .2, .3]), ('best', [1., 0., 0., 0.])])
def test_mean_and_best_go_by_load(options, how, share):
    model = vit(**options)
    dense = to_dense(model, how, {LAYER: torch.tensor([50., 0., 20., 30.])})
    for name, linear in WAYS:
        for part in ('weight', 'bias'):
            expected = sum(weight * each for weight, each in zip(
                share, whole_experts(model, linear, part)))
            torch.testing.assert_close(dense[f'{LAYER}.{name}.{part}'],
                                       expected)
    twin = ViTMoE(**VIT)
    twin.load_state_dict(dense)  # complete, nothing left over


def test_core_keeps_the_core_or_takes_the_mean():
    model = vit()
    dense = to_dense(model)
    assert torch.equal(dense[f'{LAYER}.layers.1.weight'],
                       moe_layers(model)[LAYER].core.weight('fc2'))
    model = vit(core=False)
    torch.testing.assert_close(
        to_dense(model)[f'{LAYER}.layers.1.weight'],
        whole_experts(model, 'fc2', 'weight').mean(0))


def test_one_expert_for_all_makes_best_exact():
    model = vit()
    layer = moe_layers(model)[LAYER]
    nn.init.zeros_(layer.router.scorer.weight)  # ties go to expert 0
    twin = ViTMoE(**VIT).eval()
    twin.load_state_dict(to_dense(model, 'best',
                                  {LAYER: torch.tensor([9., 0, 0, 0])}))
    x = torch.randn(1, 3, 32, 32)
    assert (twin(x)[0] - model(x)[0]).abs().max() < 1e-5


def test_bad_requests():
    with pytest.raises(ValueError, match='no MoE layer'):
        to_dense(ViTMoE(**VIT))
    with pytest.raises(ValueError, match="'median' is not one of"):
        to_dense(vit(), 'median')
    with pytest.raises(ValueError, match=f'{LAYER}: no expert took a token'):
        to_dense(vit(), 'mean', {LAYER: torch.zeros(4)})


@pytest.mark.parametrize('router', ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize('how', ['tile', 'slice', 'merge', 'prune'])
def test_every_router_follows_its_experts(router, how):
    source = vit(4, router)
    target = vit(8 if how == 'tile' else 3, router)
    loads = {LAYER: torch.tensor([1., 3., 0., 2.])}
    fitted, report = fit(target, source.state_dict(), how, loads)
    kept = {'tile': [0, 1, 2, 3] * 2, 'slice': [0, 1, 2],
            'prune': [0, 1, 3]}.get(how)
    if kept:
        key = f'{LAYER}.experts.residual_fc1_weight'
        assert torch.equal(fitted[key], source.state_dict()[key][kept])
        assert report.status[key] == 'converted'
    target.load_state_dict(fitted)
    assert torch.isfinite(target(torch.randn(1, 3, 32, 32))[0]).all()


def test_router_rows_follow():
    source, target = vit(4), vit(2)
    loads = {LAYER: torch.tensor([1., 3., 0., 2.])}
    fitted, _ = fit(target, source.state_dict(), 'prune', loads)
    key = f'{LAYER}.router.scorer.weight'
    assert torch.equal(fitted[key], source.state_dict()[key][[1, 3]])


def test_pruning_the_unused_changes_nothing():
    source = vit(4)
    layer = moe_layers(source)[LAYER]
    # experts 1 and 2 are never chosen: their logits are those of 0, halved
    # or less, with 0 and 3 of opposite sign
    with torch.no_grad():
        weight = layer.router.scorer.weight
        weight[3], weight[1], weight[2] = -weight[0], weight[0] / 2, 0
    target = vit(2)
    fitted, _ = fit(target, source.state_dict(), 'prune',
                    {LAYER: torch.tensor([5., 0., 0., 5.])})
    target.load_state_dict(fitted)
    x = torch.randn(1, 3, 32, 32)
    assert (target(x)[0] - source(x)[0]).abs().max() < 1e-5


def test_merging_equals_preserves_the_function():
    source = vit(4)
    with torch.no_grad():
        for parameter in moe_layers(source)[LAYER].experts.parameters():
            parameter[2], parameter[3] = parameter[0], parameter[1]
    target = vit(2)
    fitted, _ = fit(target, source.state_dict(), 'merge')
    key = f'{LAYER}.experts.residual_fc1_weight'
    torch.testing.assert_close(fitted[key], source.state_dict()[key][:2])


def test_merge_refuses_low_rank():
    with pytest.raises(ValueError, match="'merge' needs full-rank"):
        fit(vit(2, rank=3), vit(4, rank=3).state_dict(), 'merge')


@pytest.mark.parametrize('core_first', [True, False])
def test_core_and_no_core_are_one_function(core_first):
    source = vit(core=core_first, unrouted='zero')
    target = vit(core=not core_first, unrouted='zero')
    fitted, report = fit(target, source.state_dict())
    assert report.status[f'{LAYER}.experts.residual_fc2_weight'] == (
        'converted')
    target.load_state_dict(fitted)
    x = torch.randn(2, 3, 32, 32)
    assert (target(x)[0] - source(x)[0]).abs().max() < 1e-5
    if not core_first:
        experts = moe_layers(target)[LAYER].experts
        assert experts.residual_fc1_weight.mean(0).abs().max() < 1e-6


def test_a_bias_of_zeros_needs_no_place():
    source = vit(core=False)
    experts = moe_layers(source)[LAYER].experts
    target = vit(core=False)
    moe_layers(target)[LAYER].experts.residual_fc2_bias = None
    with pytest.raises(ValueError, match=r'residual_fc2_bias .* belongs to'):
        fit(target, source.state_dict())
    nn.init.zeros_(experts.residual_fc2_bias)
    _, report = fit(target, source.state_dict())
    assert report.left_out[f'{LAYER}.experts.residual_fc2_bias'].startswith(
        'all zero')
