"""ViTMoE against timm's and mmseg's ViT on random weights."""
import copy

import pytest
import timm
import torch
from mmseg.models.backbones import VisionTransformer as MMSegViT
from routers import ROUTERS

from rmoe.backbones import PRESETS, ViTMoE, preset
from rmoe.backbones.vit_moe import ARCHITECTURES
from rmoe.moe import collect_losses, moe_layers
from rmoe.registry import MODELS

SMALL = dict(embed_dims=24, num_layers=4, num_heads=2, mlp_dims=48,
             img_size=32, patch_size=8, out_indices=(1, 3))
MOE = dict(layers=dict(every=2), num_experts=4,
           router=dict(type='TokenChoiceRouter', noise_std=0.))
# Parameters by which the published MoE models, with 32 experts, are larger than
# their dense models, in millions (2106.05974).
PUBLISHED = {'vmoe-s32-every2': 296.9 - 36.5, 'vmoe-b16-every2': 979 - 100.5,
             'vmoe-l16-every2': 3446 - 323, 'vmoe-h14-last5': 2688.6 - 655.8}


def randomise(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=.1)
    return model


def timm_vit(**options):
    return randomise(timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2,
        mlp_ratio=2, num_classes=5, **options)).eval()


def build(moe=None, **options):
    moe = copy.deepcopy(MOE) if moe is None else moe
    return MODELS.build(dict(type='rmoe.ViTMoE', moe=moe or None,
                             **{**SMALL, **options}))


def largest(ours, theirs):
    return max(float((a - b).abs().max())
               for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize('size', [(32, 32), (40, 64), (16, 24)])
@pytest.mark.parametrize('options, ours', [
    ({}, {}),
    (dict(init_values=1.), dict(layer_scale_init_value=1.)),
    (dict(qkv_bias=False), dict(qkv_bias=False)),
    (dict(class_token=False, global_pool='avg', fc_norm=False),
     dict(with_cls_token=False)),
    # positions of patches only, as in DeiT III
    (dict(no_embed_class=True), {}),
], ids=str)
def test_dense_equals_timm(size, options, ours):
    theirs = timm_vit(dynamic_img_size=True, **options)
    model = build({}, **ours).eval()
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size)
    first, _ = theirs.forward_intermediates(
        x, indices=(1, 3), norm=False, intermediates_only=True)
    last = theirs.forward_features(x)[:, theirs.num_prefix_tokens:]
    outs = model(x)
    assert largest((outs[0], outs[1].flatten(2).transpose(1, 2)),
                   (first, last)) < 1e-5
    assert all(out.is_contiguous() for out in outs)


@pytest.mark.parametrize('size', [(32, 32), (37, 50)])
def test_dense_equals_mmseg(size):
    theirs = randomise(MMSegViT(
        img_size=32, patch_size=8, embed_dims=24, num_layers=4, num_heads=2,
        mlp_ratio=2, out_indices=(1, 3), patch_bias=True, final_norm=True,
        norm_cfg=dict(type='LN', eps=1e-6)))
    theirs.eval()
    model = build({}, antialias=False).eval()
    assert set(model.state_dict()) == set(theirs.state_dict())
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size)
    assert largest(model(x), theirs(x)) < 1e-5
    for each in (model, theirs):
        each.train()
        sum(out.square().mean() for out in each(x)).backward()
    grads = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad,
                                   atol=1e-4, rtol=1e-3, msg=name)


def test_class_token_is_handed_out():
    theirs = timm_vit()
    model = build({}, output_cls_token=True).eval()
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    (image, cls), = model(x)[1:]
    assert image.shape == (2, 24, 4, 4)
    assert (cls - theirs.forward_features(x)[:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize('name', ROUTERS)
def test_upcycled_equals_dense_and_every_parameter_learns(name):
    dense = randomise(build({})).eval()
    moe = build(dict(MOE, router=copy.deepcopy(ROUTERS[name])))
    moe.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 40, 32)
    assert all(layer.preserves_function
               for layer in moe_layers(moe.eval()).values())
    assert largest(moe(x), dense(x)) < 1e-5
    sum(out.square().sum() for out in moe.train()(x)).backward()
    for key, parameter in moe.named_parameters():
        assert parameter.grad is not None, key


def test_checkpointing_changes_nothing():
    plain = randomise(build()).train()
    saved = build(with_cp=True).train()
    saved.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for model in (plain, saved):
        collect_losses(model, start=True)
        outs = model(x)
        losses = collect_losses(model, start=False)
        (sum(out.square().mean() for out in outs) + sum(
            losses.values())).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        # two images of 16 patches and a class token, each counted once
        assert [int(layer.demand_E.sum()) for layer in moe_layers(
            model).values()] == [34, 34]
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], msg=key)


@pytest.mark.parametrize('depth, layers, blocks', [
    (8, dict(every=2), [1, 3, 5, 7]), (12, dict(every=4), [3, 7, 11]),
    (8, dict(last=2), [5, 7]), (32, dict(last=5), [23, 25, 27, 29, 31]),
    (4, (0, 3), [0, 3])])
def test_placement(depth, layers, blocks):
    with torch.device('meta'):
        model = build(dict(MOE, layers=layers), num_layers=depth,
                      out_indices=(-1, ))
    assert list(moe_layers(model)) == [f'layers.{i}.ffn' for i in blocks]


@pytest.mark.parametrize('arch, name', [
    ('tiny', 'vit_tiny_patch16_224'), ('small', 'deit3_small_patch16_224'),
    ('base', 'vit_base_patch16_224'), ('large', 'vit_large_patch16_224'),
    ('huge', 'vit_huge_patch14_224')])
def test_presets_have_the_published_parameter_counts(arch, name):
    deit3 = name.startswith('deit3')
    with torch.device('meta'):
        ours = ViTMoE(arch=arch, patch_size=int(name.split('patch')[1][:2]),
                      layer_scale_init_value=1e-4 if deit3 else 0.)
        theirs = timm.create_model(name, num_classes=0)
    # DeiT III has no position for the class token
    extra = ours.embed_dims if deit3 else 0
    assert sum(p.numel() for p in ours.parameters()) - extra == sum(
        p.numel() for p in theirs.parameters())


@pytest.mark.parametrize('name', PUBLISHED)
def test_experts_of_v_moe_have_the_published_size(name):
    with torch.device('meta'):
        sizes = [sum(p.numel() for p in MODELS.build(config).parameters())
                 for config in (preset(name), dict(preset(name), moe=None))]
    assert (sizes[0] - sizes[1]) / 1e6 == pytest.approx(PUBLISHED[name],
                                                        rel=2e-3)


def test_the_fifteen_billion_are_fifteen_billion():
    with torch.device('meta'):
        model = MODELS.build(preset('vmoe-15b'))
    assert len(moe_layers(model)) == 24
    assert 14e9 < sum(p.numel() for p in model.parameters()) < 15.5e9


def test_every_preset_builds_and_an_unknown_one_is_named():
    for name in PRESETS:
        with torch.device('meta'):
            assert moe_layers(MODELS.build(preset(name)))
    preset('swin-tiny')['moe']['num_experts'] = 3
    assert preset('swin-tiny')['moe']['num_experts'] == 8
    with pytest.raises(ValueError, match="'swin-giant' is no preset"):
        preset('swin-giant')


@pytest.mark.parametrize('frozen', [0, 2])
def test_frozen_stages_hold_from_construction(frozen):
    model = build(frozen_stages=frozen).train()
    prefixes = ('patch_embed', 'cls_token', 'pos_embed', *(
        f'layers.{i}.' for i in range(frozen)))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name
    assert not model.patch_embed.training and model.layers[3].training


def test_layer_depth():
    depth = build().get_layer_depth  # four blocks: depths 0 to 5
    assert depth('backbone.pos_embed', 'backbone.') == (0, 6)
    assert depth('backbone.layers.2.ffn.router.scorer.weight',
                 'backbone.') == (3, 6)
    assert depth('backbone.ln1.weight', 'backbone.') == (5, 6)
    assert depth('decode_head.conv_seg.weight', 'backbone.') == (5, 6)


@pytest.mark.parametrize('options, message', [
    (dict(arch='giant'), "arch='giant'"),
    (dict(arch=dict(embed_dims=32)), "arch={'embed_dims': 32} is not one of"),
    (dict(num_heads=5), 'num_heads=5 must divide embed_dims=24'),
    (dict(out_indices=(4, )), 'points at block 4, but the 4 blocks are'),
    (dict(frozen_stages=5), 'frozen_stages=5 must lie between -1 and the 4'),
    (dict(frozen_stages=-2), 'frozen_stages=-2 must lie between -1'),
    (dict(with_cls_token=False, output_cls_token=True), 'with_cls_token'),
    (dict(moe=dict(layers=dict(every=5))), "'every': 5.*up to 4 blocks"),
    (dict(moe=dict(layers=dict(last=3))), "'last': 3.*up to 2 odd"),
    (dict(moe=dict(layers=dict(first=1))), "'first': 1.*neither"),
    (dict(moe=dict(layers=(4, ))), 'names block 4'),
    (dict(moe=dict(num_experts=2)), 'moe needs layers'),
])
def test_bad_arguments_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        ViTMoE(**{**SMALL, **options})


def test_architectures_divide_their_width():
    for width, _, heads, _ in ARCHITECTURES.values():
        assert width % heads == 0
