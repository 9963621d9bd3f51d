"""SwinMoE against mmseg's, mmdet's and timm's Swin, on random weights."""
import copy
import math

import pytest
import timm
import torch
from mmdet.models.backbones import SwinTransformer as MMDetSwin
from mmseg.models.backbones import SwinTransformer as MMSegSwin

from rmoe.backbones import SwinMoE, preset
from rmoe.backbones.swin_moe import ARCHITECTURES
from rmoe.moe import collect_losses, moe_layers
from rmoe.moe.complexity import inactive_params
from rmoe.registry import MODELS

SMALL = dict(embed_dims=16, depths=(1, 2, 2), num_heads=(1, 2, 4),
             strides=(4, 2, 2), out_indices=(0, 1, 2), window_size=4,
             drop_path_rate=0.)
MOE = dict(layers=((), (1, ), (0, 1)), num_experts=4,
           router=dict(type='TokenChoiceRouter', noise_std=0.))


def randomise(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=.1)
    return model


def dense_twin(host_class, **options):
    theirs = randomise(host_class(**{**SMALL, **options}))
    theirs.eval()  # returns None
    ours = SwinMoE(**{**SMALL, **options}).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize('host_class', [MMSegSwin, MMDetSwin])
@pytest.mark.parametrize('size', [(64, 64), (33, 50), (97, 65), (16, 16)])
def test_dense_equals_the_host(host_class, size):
    ours, theirs = dense_twin(host_class)
    x = torch.randn(2, 3, *size)
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize('options', [
    dict(out_indices=(2, )), dict(window_size=7), dict(qkv_bias=False),
    dict(qk_scale=.3), dict(patch_norm=False), dict(mlp_ratio=2),
], ids=str)
def test_options_equal_the_host(options):
    ours, theirs = dense_twin(MMSegSwin, **options)
    x = torch.randn(1, 3, 60, 70)
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert (a - b).abs().max() < 1e-6


def test_gradients_equal_the_host():
    ours, theirs = dense_twin(MMSegSwin)
    x = torch.randn(1, 3, 40, 72)
    for model in (ours, theirs):
        model.train()
        sum(out.square().mean() for out in model(x)).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3,
                                   msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_presets_have_the_published_parameter_counts(arch):
    with torch.device('meta'):
        ours = SwinMoE(arch=arch)
        theirs = timm.create_model(f'swin_{arch}_patch4_window7_224',
                                   num_classes=0)
    # ours has a norm per output, theirs one on the last
    extra = sum(2 * width for width in ours.num_features[:-1])
    assert sum(p.numel() for p in ours.parameters()) - extra == sum(
        p.numel() for p in theirs.parameters())


@pytest.mark.parametrize('name, active', [
    ('swin-moe-small-e8', 65.8), ('swin-moe-base-e8', 109.3)])
def test_swin_moe_has_the_published_active_parameters(name, active):
    """With the 21,841-way head that the published number includes."""
    with torch.device('meta'):
        model = MODELS.build(preset(name))
        assert list(moe_layers(model)) == [
            *(f'stages.2.blocks.{i}.ffn' for i in range(1, 18, 2)),
            'stages.3.blocks.1.ffn']
    ours = sum(p.numel() for p in model.parameters()) - sum(
        inactive_params(layer) for layer in moe_layers(model).values())
    head = 21841 * (model.num_features[-1] + 1)
    assert (ours + head) / 1e6 == pytest.approx(active, abs=.15)


@pytest.mark.parametrize('window, pretrained', [(4, 4), (4, 6), (3, 5)])
def test_continuous_position_bias(window, pretrained):
    """Token by token from the formula of Swin V2, without its sigmoid."""
    model = randomise(SwinMoE(**{**SMALL, 'window_size': window},
                              pretrained_window_size=pretrained))
    attn = model.stages[1].blocks[0].attn.w_msa
    table = attn.cpb_mlp(attn.relative_coords_table)
    bias = table[attn.relative_position_index]
    for i, j in ((0, 0), (0, window), (window * window - 1, 1)):
        coords = []
        for a, b in ((i // window, j // window), (i % window, j % window)):
            d = 8 * (a - b) / (pretrained - 1)
            coords.append(math.copysign(math.log2(abs(d) + 1) / 3, d))
        torch.testing.assert_close(
            bias[i, j], attn.cpb_mlp(torch.tensor(coords)))


def test_one_window_size_for_each_stage():
    model = SwinMoE(**{**SMALL, 'window_size': (4, 3, 2)})
    assert [len(stage.blocks[0].attn.w_msa.relative_position_index)
            for stage in model.stages] == [16, 9, 4]
    with pytest.raises(ValueError, match=r'window_size=\(4, 2\).*3 stages'):
        SwinMoE(**{**SMALL, 'window_size': (4, 2)})


def test_fc2_bias_is_left_out_of_dense_and_moe_alike():
    model = build_moe(fc2_bias=False)
    keys = set(model.state_dict())
    assert 'stages.0.blocks.0.ffn.layers.1.weight' in keys
    assert not any(key.endswith(('ffn.layers.1.bias', 'residual_fc2_bias'))
                   for key in keys)


def build_moe(**options):
    return MODELS.build(dict(type='rmoe.SwinMoE', moe=copy.deepcopy(MOE),
                             **{**SMALL, **options}))


@pytest.mark.usefixtures('host_scope')
def test_upcycled_equals_dense_and_every_parameter_learns():
    dense = randomise(SwinMoE(**SMALL))
    moe = build_moe()
    moe.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 50, 66)
    for a, b in zip(moe(x), dense(x)):
        assert (a - b).abs().max() < 1e-5
    sum(out.square().sum() for out in moe(x)).backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name


def test_checkpointing_changes_nothing():
    plain = randomise(build_moe()).train()
    saved = build_moe(with_cp=True).train()
    saved.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 48, 48)
    grads = []
    for model in (plain, saved):
        collect_losses(model, start=True)
        outs = model(x)
        losses = collect_losses(model, start=False)
        (sum(out.square().mean() for out in outs) + sum(
            losses.values())).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        counted = [layer.demand_E.sum() for layer in
                   moe_layers(model).values()]
        assert [int(c) for c in counted] == [72, 18, 18]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize('frozen', [0, 1, 2])
def test_frozen_stages_hold_from_construction(frozen):
    model = build_moe(frozen_stages=frozen)
    prefixes = ['patch_embed'] + [f'stages.{i}.' for i in range(frozen)] + [
        f'norm{i}' for i in range(frozen)]
    for _ in range(2):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith(
                tuple(prefixes)), name
        model.train()
        assert not model.patch_embed.training
        assert model.stages[2].training


@pytest.mark.parametrize('window', [3, 5])
def test_position_tables_resize_on_load(window):
    source = randomise(SwinMoE(**SMALL))
    target = build_moe(window_size=window)
    target.load_state_dict(source.state_dict())
    table = target.stages[1].blocks[1].attn.w_msa.relative_position_bias_table
    assert len(table) == (2 * window - 1)**2
    old = source.stages[1].blocks[1].attn.w_msa.relative_position_bias_table
    expected = torch.nn.functional.interpolate(
        old.t().reshape(1, 2, 7, 7), (2 * window - 1, ) * 2, mode='bicubic')
    torch.testing.assert_close(table.t().reshape(expected.shape), expected)


def test_absolute_position_table_fits_any_image():
    model = SwinMoE(use_abs_pos_embed=True, pretrain_img_size=32, **SMALL)
    torch.nn.init.normal_(model.absolute_pos_embed)
    assert model(torch.randn(1, 3, 32, 32))[0].shape == (1, 16, 8, 8)
    assert model(torch.randn(1, 3, 40, 64))[0].shape == (1, 16, 10, 16)


def test_layer_depth():
    model = SwinMoE(**SMALL)  # five blocks: depths 0 to 6
    depth = model.get_layer_depth
    assert depth('backbone.patch_embed.projection.weight', 'backbone.') == (
        0, 7)
    assert depth('backbone.stages.1.blocks.1.ffn.router.scorer.weight',
                 'backbone.') == (3, 7)
    assert depth('backbone.stages.1.downsample.reduction.weight',
                 'backbone.') == (3, 7)
    assert depth('backbone.norm2.weight', 'backbone.') == (6, 7)
    assert depth('decode_head.conv_seg.weight', 'backbone.') == (6, 7)


@pytest.mark.parametrize('options, message', [
    (dict(arch='huge'), "arch='huge'"),
    (dict(arch=dict(embed_dims=32)), "arch={'embed_dims': 32} is not one of"),
    (dict(moe=dict(num_experts=2)), 'moe needs layers'),
    (dict(moe=dict(layers=((), (1, )))), '2 entries.*3 stages'),
    (dict(moe=dict(layers=((), (2, ), ()))), 'block 2; stage 1 has blocks 0'),
    (dict(moe=dict(layers=((), (), ()))), 'selects no block'),
    (dict(moe=dict(layers=((), (1, ), ()), expert_mismatch='drop')),
     "expert_mismatch='drop'"),
    (dict(out_indices=(3, )), 'out_indices points at stage 3'),
    (dict(frozen_stages=4), 'frozen_stages=4 must lie between -1 and the 3'),
    (dict(frozen_stages=-2), 'frozen_stages=-2 must lie between -1'),
    (dict(strides=(2, 2, 2)), 'patch_size'),
    (dict(num_heads=(1, 2)), 'of one length'),
])
def test_bad_arguments_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        SwinMoE(**{**SMALL, **options})
