"""Core + residual baked into whole experts: nothing else may change."""
import copy

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from mmseg.models.backbones.mit import MixFFN
from routers import ROUTERS, SPARSE, B, D, E, H, S, build_layer, images
from timm.layers import Mlp
from torch import nn

from rmoe import compat
from rmoe.backbones import ViTMoE
from rmoe.engine.roles import role_of
from rmoe.moe import MoEFFN, MoEMixFFN, MoEMlp, moe_layers
from rmoe.moe.complexity import complexity
from rmoe.moe.mixing import SOFT_ALIGNMENTS, SPARSE_ALIGNMENTS
from rmoe.upcycling import add_noise, fit, fold, to_dense, to_plain

TOKEN_CHOICE = dict(type='TokenChoiceRouter', noise_std=0.)
EXPERT_CHOICE = dict(type='ExpertChoiceRouter', noise_std=0.)
SOFT = ROUTERS['soft']
VIT = dict(embed_dims=24, num_layers=2, num_heads=2, mlp_dims=48, img_size=32,
           patch_size=8)
LAYER = 'layers.1.ffn'
RANKS = pytest.mark.parametrize('rank', [None, 4])
# Each router with every align and unrouted that it takes.
CASES = [
    pytest.param(router, align, unrouted, id=f'{name}, {align}, {unrouted}')
    for name, router in ROUTERS.items()
    for align in (SOFT_ALIGNMENTS if name == 'soft' else SPARSE_ALIGNMENTS)
    for unrouted in (('core', ) if name == 'soft' else ('core', 'zero'))]


def padding():
    """(B, S) bool: the second image is smaller than the others."""
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, 6:] = False
    return valid


def randomised(layer):
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=1. if 'router' in name else .3)
    return layer.eval()


def vit(router=None, moe=True, **options):
    moe = dict(layers=(1, ), num_experts=4, router=router or TOKEN_CHOICE,
               **options) if moe else None
    model = ViTMoE(**VIT, moe=moe).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.1)
    return model


def largest(one, other):
    return float((one - other).detach().abs().max())


@pytest.mark.parametrize('masked', [False, True])
@RANKS
@pytest.mark.parametrize('router, align, unrouted', CASES)
def test_same_outputs(router, align, unrouted, rank, masked):
    layer = build_layer(router, align=align, unrouted=unrouted,
                        rank=rank).eval()
    x, valid = images(), padding() if masked else None
    expected = layer(x, valid=valid)
    fold(layer)
    assert largest(layer(x, valid=valid), expected) < 1e-5


@RANKS
@pytest.mark.parametrize('name', SPARSE)
def test_same_outputs_of_timms_mlp(name, rank):
    layer = randomised(MoEMlp(Mlp(D, H), E, SPARSE[name], rank=rank))
    x, valid = images(), padding()
    expected = layer(x, valid=valid)
    fold(layer)
    assert largest(layer(x, valid=valid), expected) < 1e-5


@RANKS
@pytest.mark.parametrize('name', ['token choice', 'token choice k=2',
                                  'sinkhorn token choice', 'cosine',
                                  'bias balanced k=2'])
def test_same_outputs_of_a_mix_ffn(name, rank):
    layer = randomised(MoEMixFFN(MixFFN(D, H), E, SPARSE[name], rank=rank))
    x = images(tokens=12)
    expected = layer(x, (3, 4))
    fold(layer)
    assert largest(layer(x, (3, 4)), expected) < 1e-5
    nn.init.zeros_(layer.layers[1].weight)  # the convolution is still used
    assert largest(layer(x, (3, 4)), expected) > 1e-2


@pytest.mark.parametrize('options', [{}, dict(layer_scale_init_value=.5),
                                     dict(fc2_bias=False)], ids=str)
def test_same_outputs_in_bfloat16(options):
    """Of a full rank the same sum is rounded at another time."""
    layer = build_layer(TOKEN_CHOICE, **options).eval()
    x = images()
    with torch.autocast('cpu', torch.bfloat16):
        expected = layer(x)
        fold(layer)
        assert torch.equal(layer(x), expected)


@pytest.mark.torch('2.6')
@pytest.mark.parametrize('router', [EXPERT_CHOICE, SOFT, TOKEN_CHOICE],
                         ids=lambda router: router['type'])
def test_same_outputs_of_a_graph(router):
    torch._dynamo.reset()
    layer = build_layer(router, rank=4).eval()
    x = images()
    expected = layer(x)
    fold(layer)
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    assert largest(compiled(x), expected) < 1e-5


@pytest.mark.torch(compat.NEEDS['export by torch.export or to ONNX'])
def test_same_outputs_of_an_export():
    layer = build_layer(TOKEN_CHOICE, rank=4).eval()
    x = images()
    expected = layer(x)
    fold(layer)
    exported = torch.export.export(layer, (x, )).module()
    assert largest(exported(x), expected) < 1e-5


def test_experts_are_whole():
    layer = build_layer(TOKEN_CHOICE, rank=4)
    core, experts = layer.core, layer.experts
    weight_EOI = core.weight('fc1') + (
        experts.residual_fc1_up @ experts.residual_fc1_down)
    bias_EO = core.bias('fc2') + experts.residual_fc2_bias
    fold(layer)
    torch.testing.assert_close(experts.residual_fc1_weight, weight_EOI)
    torch.testing.assert_close(experts.residual_fc2_bias, bias_EO)
    assert not any('_up' in key or '_down' in key
                   for key in layer.state_dict())
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad == (role_of(name) != 'residual')


def test_only_tokens_without_an_expert_meet_the_core():
    layer = build_layer(EXPERT_CHOICE).eval()
    x = images()
    kept_T = layer.router(x.flatten(0, 1), None, B).kept_per_token()
    assert 0 < int((kept_T == 0).sum()) < len(kept_T)
    fold(layer)
    before = layer(x)
    nn.init.zeros_(layer.layers[0][0].weight)
    changed_T = (layer(x) != before).flatten(0, 1).any(1)
    assert torch.equal(changed_T, kept_T == 0)


def test_core_only_stays_dense():
    layer = build_layer(TOKEN_CHOICE).eval()
    layer.core_only = True
    x = images()
    expected = layer(x)
    fold(layer)
    assert torch.equal(layer(x), expected)


def test_folding_again_or_without_a_core_changes_nothing():
    for options in ({}, dict(core=False)):
        layer = build_layer(TOKEN_CHOICE, **options).eval()
        fold(layer)
        state = copy.deepcopy(layer.state_dict())
        fold(layer)
        assert all(torch.equal(value, state[key])
                   for key, value in layer.state_dict().items())
    layer.router.loss_weights = {}
    layer.train()(images())  # plain experts train as before


def test_nothing_to_fold():
    for function in (fold, to_plain):
        with pytest.raises(ValueError, match='no MoE layer to fold'):
            function(FFN(8, 16))


@pytest.mark.parametrize('core_only', [False, True])
def test_training_is_refused(core_only):
    model = vit()
    fold(model)
    moe_layers(model)[LAYER].core_only = core_only
    for copied in (model, copy.deepcopy(model)):
        copied.train()
        with pytest.raises(ValueError, match=r'block 1 is folded .*eval\(\)'):
            copied(torch.randn(1, 3, 32, 32))
        copied.eval()(torch.randn(1, 3, 32, 32))


def test_loads_into_a_folded_model_alone():
    model, other = vit(rank=4), vit(rank=4)
    unfolded = copy.deepcopy(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)[0]
    fold(model)
    for target in (other, vit(), vit(core=False)):
        with pytest.raises(ValueError, match=f'{LAYER} was folded for infer'):
            target.load_state_dict(model.state_dict())
    fold(other)
    other.load_state_dict(model.state_dict())
    assert largest(other(x)[0], expected) < 1e-5
    dense = vit(moe=False).state_dict()
    for state in (unfolded, dense, vit().state_dict()):
        with pytest.raises(ValueError, match='into a new model and call'):
            other.load_state_dict(state)
    assert largest(other(x)[0], expected) < 1e-5


def test_noise_is_refused():
    model = vit()
    fold(model)
    with pytest.raises(ValueError, match=f'{LAYER} is folded'):
        add_noise(model, .1, 0)


@RANKS
@pytest.mark.parametrize('how', ['core', 'mean', 'best'])
def test_to_dense_is_that_of_the_model_before(how, rank):
    model = vit(rank=rank)
    loads = {LAYER: torch.tensor([1., 3., 0., 2.])}
    expected = to_dense(model, how, loads)
    fold(model)
    dense = to_dense(model, how, loads)
    assert dense.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(dense[key], value)


@pytest.mark.parametrize('options', [{}, dict(router=EXPERT_CHOICE),
                                     dict(router=SOFT)], ids=str)
def test_costs_and_promise_stay(options):
    model, x = vit(**options), torch.randn(1, 3, 32, 32)
    before = complexity(model, x)
    promises = moe_layers(model)[LAYER].preserves_function
    fold(model)
    assert complexity(model, x) == before
    assert moe_layers(model)[LAYER].preserves_function == promises


@pytest.mark.parametrize('folded_before', [False, True])
@RANKS
@pytest.mark.parametrize('options', [
    {}, dict(align='renormalize'), dict(router=SPARSE['token choice k=2']),
    # capacity in training alone
    dict(router=dict(TOKEN_CHOICE, capacity_factor=.5)),
    dict(router=EXPERT_CHOICE, unrouted='zero'),
    dict(router=SOFT, align='none')], ids=str)
def test_plain_twin_computes_the_same(options, rank, folded_before):
    model, x = vit(rank=rank, **options), torch.randn(2, 3, 32, 32)
    expected = model(x)[0]
    if folded_before:
        fold(model)
    plain = vit(core=False, **options)
    plain.load_state_dict(to_plain(model))
    assert largest(plain(x)[0], expected) < 1e-5
    # a complete file of a model without a core
    assert set(to_plain(model)) == set(plain.state_dict())


def test_plain_twin_goes_back_under_a_core():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    again = vit()
    again.load_state_dict(to_plain(model))
    assert largest(again(x)[0], model(x)[0]) < 1e-5


def test_plain_twin_of_a_plain_model_is_itself():
    model = vit(core=False)
    state = to_plain(model)
    fitted, _ = fit(model, state)
    assert all(torch.equal(value, fitted[key])
               for key, value in model.state_dict().items())


def mix_ffn():
    return MoEMixFFN(MixFFN(D, H), E, TOKEN_CHOICE)


@pytest.mark.parametrize('build, reason', [
    (lambda: build_layer(EXPERT_CHOICE), 'ExpertChoiceRouter leaves out'),
    (lambda: build_layer(SPARSE['token choice, capacity']),
     "unrouted='core'"),
    (lambda: build_layer(SOFT), "align='difference'"),
    (mix_ffn, 'convolution of its core')])
@pytest.mark.parametrize('training', [False, True])
def test_no_plain_twin_where_the_core_is_needed(build, reason, training):
    model = nn.Sequential(build()).train(training)
    with pytest.raises(ValueError, match=f'0 needs its core .*{reason}'):
        to_plain(model)
    assert model[0].router.training == training


def test_only_evaluation_decides_about_the_core():
    router = dict(TOKEN_CHOICE, capacity_factor=.5)
    layer = MoEFFN(D, H, E, router).train()
    assert 'layers.0.0.weight' not in to_plain(nn.Sequential(layer))


@pytest.mark.parametrize('rank', [None, 4])
def test_folding_keeps_the_type(rank):
    layer = build_layer(ROUTERS['token choice'], rank=rank).bfloat16().eval()
    x = images().bfloat16()
    with torch.no_grad():
        expected = layer(x)
        fold(layer)
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(layer(x), expected, rtol=.05, atol=.05)
