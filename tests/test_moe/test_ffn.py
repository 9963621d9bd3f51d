"""MoEFFN in the place of mmcv's FFN, with what mmcv puts around it."""
import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from reference import mixture
from routers import SPARSE, D, E, H, build_layer, images, route
from torch import nn

from rmoe.moe import MoEFFN
from rmoe.moe.ffn import LayerScale

ROUTER = dict(type='TokenChoiceRouter', noise_std=0.)


def dense(**options):
    ffn = FFN(D, H, act_cfg=dict(type='GELU'), **options).eval()
    for parameter in ffn.parameters():
        nn.init.normal_(parameter, std=.3)
    return ffn


@pytest.mark.parametrize('name', SPARSE)
@pytest.mark.parametrize('core', [True, False])
def test_no_fc2_bias_equals_the_loop(name, core):
    layer = build_layer(SPARSE[name], core=core, fc2_bias=False,
                        add_identity=False).eval()
    assert not any('fc2_bias' in key or key == 'layers.1.bias'
                   for key, _ in layer.named_parameters())
    x = images()
    torch.testing.assert_close(
        layer(x).flatten(0, 1),
        mixture(layer, x.flatten(0, 1), route(layer, x)),
        atol=1e-5, rtol=1e-4)
    layer(x).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key


@pytest.mark.parametrize('core', [True, False])
@pytest.mark.parametrize('options', [
    {}, dict(layer_scale_init_value=.5), dict(add_identity=False),
    dict(dropout_layer=dict(type='DropPath', drop_prob=.5), ffn_drop=.5)],
    ids=str)
def test_from_dense_is_the_dense_ffn(core, options):
    ffn = dense(**options)
    layer = MoEFFN.from_dense(ffn, num_experts=E, router=ROUTER,
                              core=core).eval()
    x, identity = images(), images()
    for args in ((x, ), (x, identity)):
        torch.testing.assert_close(layer(*args), ffn(*args))
    state = layer.state_dict()
    kept = {key for key in ffn.state_dict() if core or 'layers' not in key}
    assert kept <= set(state)
    for key in kept:
        assert torch.equal(state[key], ffn.state_dict()[key])


def test_layer_scale_is_that_of_mmcv():
    theirs = dense(layer_scale_init_value=.5)
    ours = MoEFFN(D, H, E, router=ROUTER, layer_scale_init_value=.5).eval()
    assert set(theirs.state_dict()) <= set(ours.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = images()
    torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(LayerScale(3, .5).weight, torch.full((3, ), .5))


def test_three_linear_layers_cannot_become_experts():
    with pytest.raises(ValueError, match='num_fcs=3'):
        MoEFFN.from_dense(dense(num_fcs=3))
