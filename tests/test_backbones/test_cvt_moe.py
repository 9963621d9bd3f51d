"""CvTMoE against transformers' CvT, on random weights and statistics."""
import re

import numpy as np
import pytest
import torch
from mmdet.models.necks import FPN
from mmseg.models.decode_heads import UPerHead
from torch import nn
from transformers import CvtConfig, CvtForImageClassification, CvtModel

from rmoe.backbones import CvTMoE
from rmoe.backbones.conv_attention import ConvAttention
from rmoe.backbones.presets import preset
from rmoe.moe import collect_losses, moe_layers
from rmoe.registry import MODELS
from rmoe.upcycling import fit, read_checkpoint, state_dict_of

SMALL = dict(embed_dims=(16, 32, 64), depths=(1, 2, 3), num_heads=(1, 2, 4),
             drop_path_rates=(0., 0., 0.))
HF_SMALL = dict(embed_dim=[16, 32, 64], depth=[1, 2, 3], num_heads=[1, 2, 4],
                drop_path_rate=[0., 0., 0.], output_hidden_states=True)
GELU = dict(type='GELU')
ROUTERS = [dict(type='TokenChoiceRouter', noise_std=0., loss_weights={}),
           dict(type='ExpertChoiceRouter', noise_std=0.)]
# Hugging Face's names to the original ones, in order.
ORIGINAL = [
    (r'encoder\.stages\.', 'stage'), (r'\.layers\.', '.blocks.'),
    (r'embedding\.convolution_embeddings\.projection', 'patch_embed.proj'),
    (r'embedding\.convolution_embeddings\.normalization', 'patch_embed.norm'),
    (r'attention\.output\.dense', 'attn.proj'),
    (r'attention\.attention', 'attn'), ('layernorm_before', 'norm1'),
    ('layernorm_after', 'norm2'), (r'intermediate\.dense', 'mlp.fc1'),
    (r'output\.dense', 'mlp.fc2'), (r'\.convolution\.', '.conv.'),
    (r'\.normalization\.', '.bn.'),
    (r'convolution_projection_(.)\w+\.\w+', r'conv_proj_\1'),
    (r'attn\.projection_(.)\w+', r'attn.proj_\1')]


def original(state):
    for old, new in ORIGINAL:
        state = {re.sub(old, new, key): state[key] for key in state}
    return state


def randomise(model):
    """Weights large enough that attention is far from uniform."""
    for name, parameter in model.named_parameters():
        is_norm = parameter.dim() == 1 and name.endswith('weight')
        nn.init.normal_(parameter, float(is_norm), std=.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=.3)
            nn.init.uniform_(module.running_var, .1, 1)
    return model.eval()


def hf_model(cls_token=True, quick=False):
    model = randomise(CvtModel(CvtConfig(
        **HF_SMALL, cls_token=[False, False, cls_token])))
    for module in model.modules():
        if quick and isinstance(module, nn.GELU):
            module.forward = lambda x: x * torch.sigmoid(1.702 * x)
    return model


def with_weights(state, act_cfg=GELU, **options):
    """The model without norms on its outputs, which the source does not
    have."""
    model = CvTMoE(**SMALL, act_cfg=act_cfg, **options).eval()
    model.load_state_dict(state)
    for i in model.out_indices:
        setattr(model, f'norm{i}', nn.Identity())
    return model


def build_moe(router=ROUTERS[0], **options):
    moe = dict(layers=((), (1, ), (0, 2)), num_experts=4, router=router)
    return MODELS.build(dict(SMALL, type='rmoe.CvTMoE', moe=moe, **options))


def assert_equal(ours, theirs, size=(61, 47)):
    x = torch.randn(2, 3, *size)
    maps = theirs(x)
    for a, b in zip(ours(x), getattr(maps, 'hidden_states', maps), strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        assert (a - b).abs().max() < 1e-5


def backward(maps, losses=()):
    (sum(out.square().mean() for out in maps) + sum(losses)).backward()


@pytest.mark.parametrize('size', [(64, 64), (33, 50), (97, 65), (16, 16)])
def test_features_equal_transformers(size):
    theirs = hf_model()
    assert_equal(with_weights(theirs.state_dict()), theirs, size)


def test_original_names_and_their_quick_gelu():
    theirs = hf_model(quick=True)
    state = original(theirs.state_dict())
    state['norm.weight'] = state['head.weight'] = torch.ones(64)
    assert_equal(with_weights(state, act_cfg=None), theirs)
    report = fit(CvTMoE(**SMALL), state)[1]
    assert set(report.left_out) == {'norm.weight', 'head.weight'}


@pytest.mark.parametrize('training', [True, False])
def test_gradients_and_statistics_equal_transformers(training):
    theirs = hf_model().double().train(training)
    ours = with_weights(theirs.state_dict()).double().train(training)
    x = torch.randn(2, 3, 50, 67, dtype=torch.float64)
    backward(ours(x))
    backward(theirs(x).hidden_states)
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    expected = fit(CvTMoE(**SMALL, act_cfg=GELU).double(),
                   {**theirs.state_dict(), **grads})[0]
    for key, value in [*ours.named_parameters(), *ours.named_buffers()]:
        torch.testing.assert_close(value if value.grad is None else value.grad,
                                   expected[key], msg=key)


@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
def test_a_saved_classifier_loads(file, tmp_path):
    theirs = randomise(CvtForImageClassification(CvtConfig(**HF_SMALL)))
    theirs.save_pretrained(tmp_path, safe_serialization='safe' in file)
    state = state_dict_of(read_checkpoint(tmp_path / file))
    with pytest.raises(ValueError, match=r"under 'cvt\.'.*prefix='cvt\.'"):
        CvTMoE(**SMALL, act_cfg=GELU).load_state_dict(state)
    assert_equal(with_weights({key[4:]: value for key, value in state.items()
                               if key.startswith('cvt.')}), theirs.cvt)


@pytest.mark.parametrize('in_front', [0, 1])
def test_attention_scales_by_the_whole_width(in_front):
    attn = randomise(ConvAttention(
        12, 3, True, 0., 0., dict(type='DropPath'), dict(type='BN')))
    x = 9 * torch.randn(2, in_front + 5 * 7, 12)
    cls, image = x[:, :in_front], x[:, in_front:].mT.reshape(2, 12, 5, 7)
    query, key, value = (
        getattr(attn, f'proj_{name}')(torch.cat([cls, getattr(
            attn, f'conv_proj_{name}')(image)], 1)).view(2, -1, 3, 4)
        for name in 'qkv')
    assert key.shape[1] == in_front + 3 * 4  # half of 5x7
    scores = torch.einsum('bihd,bjhd->bhij', query, key) / 12**.5
    mixed = torch.einsum('bhij,bjhd->bihd', scores.softmax(-1), value)
    assert (attn(x, (5, 7)) - attn.proj(mixed.flatten(2))).abs().max() < 1e-5


def test_without_class_token():
    state, theirs = hf_model().state_dict(), hf_model(cls_token=False)
    theirs.load_state_dict(state, strict=False)
    ours = with_weights(state, with_cls_token=False)
    assert_equal(ours, theirs)
    assert fit(ours, state)[1].left_out == {
        'stages.2.cls_token': 'class token, which the model has not'}


@pytest.mark.parametrize('moe', [None, dict(layers=((0, ), ) * 3, core=False)])
def test_the_activation_of_another_source_is_an_error(moe):
    state = hf_model().state_dict()
    with pytest.raises(ValueError, match=r'trained with GELU, the model has '
                       r"QuickGELU\(\): set act_cfg=dict\(type='GELU'\)"):
        CvTMoE(**SMALL, moe=moe).load_state_dict(state)
    with pytest.raises(ValueError, match=r'trained with QuickGELU, the model '
                       r"has GELU\(.*: set act_cfg=dict\(type='rmoe.Quick"):
        CvTMoE(**SMALL, moe=moe, act_cfg=GELU).load_state_dict(original(state))
    with pytest.raises(ValueError, match=r"approximate='tanh'\): set act_cfg"):
        CvTMoE(**SMALL, moe=moe, act_cfg=dict(
            type='GELU', approximate='tanh')).load_state_dict(state)


@pytest.mark.parametrize('norm_eval', [True, False])
def test_norm_eval_keeps_statistics_and_trains_weights(norm_eval):
    model = randomise(CvTMoE(**SMALL, norm_eval=norm_eval)).train()
    before = {key: value.clone() for key, value in model.named_buffers()}
    backward(model(torch.randn(2, 3, 40, 40)))
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key]) == norm_eval, key
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize('frozen', [-1, 0, 1, 3])
def test_frozen_stages_hold_from_construction(frozen):
    model = CvTMoE(**SMALL, frozen_stages=frozen)
    prefixes = tuple(name for i in range(frozen)
                     for name in (f'stages.{i}.', f'norm{i}.'))
    before = {key: value.clone() for key, value in model.named_buffers()}
    for _ in range(2):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith(prefixes), name
        model.train()
    model(torch.randn(2, 3, 40, 40))
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key]) == key.startswith(prefixes)


@pytest.mark.parametrize('name, dims, depth, heads, millions', [
    ('13', [64, 192, 384], [1, 2, 10], [1, 3, 6], 20),
    ('21', [64, 192, 384], [1, 4, 16], [1, 3, 6], 32),
    ('w24', [192, 768, 1024], [2, 2, 20], [3, 12, 16], 277)])
def test_presets(name, dims, depth, heads, millions, monkeypatch):
    # transformers reads numbers from it, which meta tensors have not
    monkeypatch.setattr(torch, 'linspace', np.linspace)
    config = preset(f'cvt-{name}')
    moe = config.pop('moe')
    with torch.device('meta'):
        ours, with_experts = (MODELS.build(dict(config, moe=each))
                              for each in (None, moe))
        theirs = CvtModel(CvtConfig(embed_dim=dims, depth=depth))
    count, bare, more = (sum(p.numel() for p in model.parameters())
                         for model in (ours, theirs, with_experts))
    # ours has a norm per output; the whole model one more and a classifier
    assert count == bare + 2 * sum(dims)
    assert round((bare + 1002 * dims[-1] + 1000) / 1e6) == millions
    assert heads == [stage.blocks[0].attn.num_heads for stage in ours.stages]
    # residuals of 8 experts (8 D^2 + 5 D each) and a router (8 D) per layer
    assert more - count == sum(
        len(blocks) * 8 * (8 * d * d + 6 * d)
        for blocks, d in zip(moe['layers'], dims))


def test_strides_and_odd_images():
    with torch.device('meta'):
        model = CvTMoE(**SMALL)
        shapes = [[out.shape[1:] for out in model(torch.empty(1, 3, *size))]
                  for size in [(50, 83), (800, 1333)]]
    assert shapes == [[(16, 12, 21), (32, 6, 11), (64, 3, 6)],
                      [(16, 200, 333), (32, 100, 167), (64, 50, 84)]]


@pytest.mark.usefixtures('host_scope')
@pytest.mark.parametrize('router', ROUTERS, ids=lambda r: r['type'])
def test_upcycled_equals_dense_and_every_parameter_learns(router):
    dense, moe = randomise(CvTMoE(**SMALL)), build_moe(router)
    moe.load_state_dict(dense.state_dict())
    for mode in (False, True):
        assert_equal(moe.train(mode), dense.train(mode))
    backward(moe(torch.randn(2, 3, 50, 66)))
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or 'router' not in name, name


@pytest.mark.parametrize('what', ['gradients', 'statistics'])
def test_checkpointing_changes_nothing(what):
    router = dict(type='TokenChoiceRouter', noise_std=0.)
    models = [randomise(build_moe(router)), build_moe(router, with_cp=True)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 48, 48)
    values = []
    for model in models:
        collect_losses(model.train(), start=True)
        backward(model(x), collect_losses(model, start=False).values())
        # 6x6 tokens at stride 8; 3x3 and the class token at stride 16
        assert [int(layer.demand_E.sum()) for layer in
                moe_layers(model).values()] == [72, 20, 20]
        values.append(dict(model.named_buffers()) if what == 'statistics'
                      else {n: p.grad for n, p in model.named_parameters()})
    for name, value in values[0].items():
        torch.testing.assert_close(value, values[1][name], msg=name)


def test_layer_depth_and_drop_path():
    model = CvTMoE(**{**SMALL, 'drop_path_rates': (.1, .2, 1 - 1e-7)})
    for name, expected in {
            'stages.0.patch_embed.norm.bias': 0, 'stages.2.cls_token': 3,
            'stages.0.blocks.0.attn.conv_proj_q.bn.weight': 1,
            'stages.1.patch_embed.norm.bias': 1, 'norm0.weight': 7,
            'stages.1.blocks.1.ffn.router.scorer.weight': 3,
            'stages.2.blocks.2.norm1.weight': 6}.items():
        assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (
            expected, 8), name
    assert model.get_layer_depth('stages.0.cls_token', 'backbone.')[0] == 7
    assert [[round(block.attn.drop.drop_prob, 6) for block in stage.blocks]
            for stage in model.stages] == [[0.], [0., .2], [0., .5, 1.]]
    x = torch.randn(2, 6, 64)
    assert torch.equal(model.train().stages[2].blocks[2](x, (2, 3)), x)


def test_dense_heads_take_the_maps():
    maps = build_moe()(torch.randn(2, 3, 64, 80))
    head = UPerHead(in_channels=[16, 32, 64], in_index=[0, 1, 2], channels=8,
                    num_classes=5).eval()
    assert head(maps).shape == (2, 5, 16, 20)
    neck = FPN([16, 32, 64], 8, num_outs=5, add_extra_convs='on_output')
    assert [out.shape[3] for out in neck(maps)] == [20, 10, 5, 3, 2]


@pytest.mark.parametrize('options, message', [
    (dict(arch='14'), r"arch='14' is not one of \('13', '21', 'w24'\)"),
    (dict(arch=dict(embed_dims=32)), "arch={'embed_dims': 32} is not one of"),
    (dict(moe=dict(layers=((), (2, ), ()))), 'block 2; stage 1 has blocks 0'),
    (dict(out_indices=(0, 3)),
     'out_indices points at stage 3, but the 3 stages are numbered from 0'),
    (dict(frozen_stages=4), 'frozen_stages=4 must lie between -1 and the 3'),
    (dict(frozen_stages=-2), 'frozen_stages=-2 must lie between -1'),
    *((dict({name: (1, 2)}), rf'{name}=\(1, 2\) must have one entry for each')
      for name in ('embed_dims', 'num_heads', 'strides', 'patch_padding')),
], ids=str)
def test_bad_arguments_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        CvTMoE(**{**SMALL, **options})
