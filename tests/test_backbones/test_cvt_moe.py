"""CvTMoE against transformers' CvT, on random weights and statistics."""
import copy

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
                drop_path_rate=[0., 0., 0.])
GELU = dict(type='GELU')
ROUTERS = [dict(type='TokenChoiceRouter', noise_std=0., loss_weights={}),
           dict(type='ExpertChoiceRouter', noise_std=0.)]
# Hugging Face's names to the original ones, in order.
ORIGINAL = [
    ('encoder.stages.', 'stage'), ('.layers.', '.blocks.'),
    ('embedding.convolution_embeddings.projection', 'patch_embed.proj'),
    ('embedding.convolution_embeddings.normalization', 'patch_embed.norm'),
    ('attention.output.dense', 'attn.proj'),
    ('attention.attention.', 'attn.'), ('layernorm_before', 'norm1'),
    ('layernorm_after', 'norm2'), ('intermediate.dense', 'mlp.fc1'),
    ('output.dense', 'mlp.fc2')] + [
        pair for ours, theirs in zip('qkv', ('query', 'key', 'value'))
        for pair in [
            (f'convolution_projection_{theirs}.convolution_projection.'
             'convolution', f'conv_proj_{ours}.conv'),
            (f'convolution_projection_{theirs}.convolution_projection.'
             'normalization', f'conv_proj_{ours}.bn'),
            (f'projection_{theirs}', f'proj_{ours}')]]
OURS = [('stage', 'stages.'), ('patch_embed.proj', 'patch_embed.projection'),
        ('mlp.fc1', 'ffn.layers.0.0'), ('mlp.fc2', 'ffn.layers.1')]


class QuickGELU(nn.Module):

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def rename(key, table):
    for old, new in table:
        key = key.replace(old, new)
    return key


def randomise(model):
    """Large enough that attention is far from uniform."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=.2)
        if parameter.dim() == 1 and name.endswith('weight'):
            parameter.data += 1
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=.3)
            nn.init.uniform_(module.running_var, .5, 2)
    return model.eval()


def theirs_of(cls_token=True, quick=False):
    model = randomise(CvtModel(CvtConfig(
        **HF_SMALL, cls_token=[False, False, cls_token])))
    for module in list(model.modules()):
        if quick and hasattr(module, 'activation'):
            module.activation = QuickGELU()
    return model


def ours_of(state, act_cfg=GELU, **options):
    """With the file's weights, and bare outputs as the source has no norm."""
    model = CvTMoE(**{**SMALL, 'act_cfg': act_cfg, **options}).eval()
    model.load_state_dict(state)
    for i in model.out_indices:
        setattr(model, f'norm{i}', nn.Identity())
    return model


def hidden_states(model, x):
    return model(x, output_hidden_states=True).hidden_states


def assert_equal_maps(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        assert (a - b).abs().max() < tolerance


@pytest.mark.parametrize('size', [(64, 64), (33, 50), (97, 65), (16, 16)])
@torch.no_grad()
def test_features_equal_transformers(size):
    theirs = theirs_of()
    x = torch.randn(2, 3, *size)
    assert_equal_maps(ours_of(theirs.state_dict())(x),
                      hidden_states(theirs, x))


@torch.no_grad()
def test_original_names_and_their_quick_gelu():
    theirs = theirs_of(quick=True)
    state = {rename(key, ORIGINAL): value
             for key, value in theirs.state_dict().items()}
    assert 'stage2.blocks.1.attn.conv_proj_k.bn.running_var' in state
    state['norm.weight'] = state['head.weight'] = torch.ones(64)
    ours = ours_of(state, act_cfg=None)
    x = torch.randn(2, 3, 61, 47)
    assert_equal_maps(ours(x), hidden_states(theirs, x))
    report = fit(CvTMoE(**SMALL), state)[1]
    assert set(report.left_out) == {'norm.weight', 'head.weight'}


@pytest.mark.parametrize('training', [True, False])
def test_gradients_and_statistics_equal_transformers(training):
    theirs = theirs_of().double().train(training)
    ours = ours_of(theirs.state_dict()).double().train(training)
    x = torch.randn(2, 3, 50, 67, dtype=torch.float64)
    for maps in (ours(x), hidden_states(theirs, x)):
        sum(out.square().mean() for out in maps).backward()
    names = {key: rename(rename(key, ORIGINAL), OURS)
             for key in theirs.state_dict()}
    assert sorted(names.values()) == sorted(ours.state_dict())
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(names[key]).grad,
                                   parameter.grad, msg=key)
    for key, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(names[key]), buffer)


@pytest.mark.parametrize('safe', [True, False])
@torch.no_grad()
def test_a_saved_classifier_loads(safe, tmp_path):
    theirs = randomise(CvtForImageClassification(CvtConfig(**HF_SMALL)))
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    path = tmp_path / ('model.safetensors' if safe else 'pytorch_model.bin')
    state = state_dict_of(read_checkpoint(path))
    with pytest.raises(ValueError, match="them under 'cvt.'.*prefix='cvt.'"):
        CvTMoE(**SMALL, act_cfg=GELU).load_state_dict(state)
    ours = ours_of({key.removeprefix('cvt.'): value for key, value in
                    state.items() if key.startswith('cvt.')})
    x = torch.randn(1, 3, 40, 56)
    assert_equal_maps(ours(x), hidden_states(theirs.cvt, x))


@pytest.mark.parametrize('tokens_in_front', [0, 1])
@torch.no_grad()
def test_attention_scales_by_the_whole_width(tokens_in_front):
    attention = randomise(ConvAttention(12, 3, True, 0., 0.,
                                        dict(type='BN')))
    x = torch.randn(2, tokens_in_front + 5 * 7, 12)
    cls, image = x.split([tokens_in_front, 35], 1)
    image = image.mT.reshape(2, 12, 5, 7)
    heads = {}
    for name, stride in (('q', 1), ('k', 2), ('v', 2)):
        projection = getattr(attention, f'conv_proj_{name}')
        maps = nn.functional.conv2d(image, projection.conv.weight, None,
                                    stride, 1, groups=12)
        mean, var, weight, bias = (
            getattr(projection.bn, each)[:, None, None] for each in
            ('running_mean', 'running_var', 'weight', 'bias'))
        maps = (maps - mean) / (var + 1e-5).sqrt() * weight + bias
        tokens = torch.cat([cls, maps.flatten(2).mT], 1)
        linear = getattr(attention, f'proj_{name}')
        heads[name] = (tokens @ linear.weight.T + linear.bias).view(
            2, -1, 3, 4)
    # half of 5x7 is 3x4
    assert heads['k'].shape[1] == 12 + tokens_in_front
    scores = torch.einsum('bihd,bjhd->bhij', heads['q'], heads['k'])
    mixed = torch.einsum('bhij,bjhd->bihd', (scores / 12**.5).softmax(-1),
                         heads['v']).flatten(2)
    expected = mixed @ attention.proj.weight.T + attention.proj.bias
    assert (attention(x, (5, 7)) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_without_class_token():
    state, theirs = theirs_of().state_dict(), theirs_of(cls_token=False)
    key = 'encoder.stages.2.cls_token'
    theirs.load_state_dict({k: v for k, v in state.items() if k != key})
    ours = ours_of(state, with_cls_token=False)
    x = torch.randn(2, 3, 48, 52)
    assert_equal_maps(ours(x), hidden_states(theirs, x))
    # the token matters: this is another function
    assert (ours(x)[2] - ours_of(state)(x)[2]).abs().max() > 1e-2
    model = CvTMoE(**SMALL, act_cfg=GELU, with_cls_token=False)
    assert fit(model, state)[1].left_out == {
        'stages.2.cls_token': 'class token, which the model has not'}


@pytest.mark.parametrize('moe', [None, dict(layers=((0, ), (), ()))])
def test_the_activation_of_another_source_is_an_error(moe):
    state = theirs_of().state_dict()
    with pytest.raises(ValueError, match=r'trained with GELU, the model has '
                       r"QuickGELU: set act_cfg=dict\(type='GELU'\)"):
        CvTMoE(**SMALL, moe=moe).load_state_dict(state)
    original = {rename(key, ORIGINAL): state[key] for key in state}
    with pytest.raises(ValueError, match=r'trained with QuickGELU, the model '
                       r"has GELU: set act_cfg=dict\(type='rmoe.QuickGELU'"):
        CvTMoE(**SMALL, moe=moe, act_cfg=GELU).load_state_dict(original)


@pytest.mark.parametrize('norm_eval', [True, False])
def test_norm_eval_keeps_statistics_and_trains_weights(norm_eval):
    model = randomise(CvTMoE(**SMALL, norm_eval=norm_eval)).train()
    before = {key: value.clone() for key, value in model.named_buffers()}
    sum(out.square().mean() for out in model(torch.randn(
        2, 3, 40, 40))).backward()
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key]) == norm_eval, key
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert model.stages[0].patch_embed.norm.training


@pytest.mark.parametrize('frozen', [0, 1, 3])
def test_frozen_stages_hold_from_construction(frozen):
    model = build_moe(frozen_stages=frozen)
    prefixes = tuple(name for i in range(frozen)
                     for name in (f'stages.{i}.', f'norm{i}.'))
    before = {key: value.clone() for key, value in model.named_buffers()}
    for _ in range(2):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith(prefixes), name
        for name, module in model.train().named_modules():
            if name:
                assert module.training != f'{name}.'.startswith(prefixes), name
    model(torch.randn(2, 3, 40, 40))
    for key, value in model.named_buffers():
        if 'running' in key:
            assert torch.equal(value, before[key]) == key.startswith(prefixes)


@pytest.mark.parametrize('name, millions', [
    ('13', 20), ('21', 32), ('w24', 277)])
def test_presets_have_the_published_parameter_counts(name, millions):
    config = preset(f'cvt-{name}')
    moe = config.pop('moe')
    with torch.device('meta'):
        ours, with_experts = (MODELS.build(dict(config, moe=each))
                              for each in (None, moe))
        theirs = CvtForImageClassification(CvtConfig(
            embed_dim=list(ours.embed_dims), depth=list(ours.depths),
            num_heads=[stage.blocks[0].attn.num_heads
                       for stage in ours.stages], num_labels=1000))
    count, published, more = (sum(p.numel() for p in model.parameters())
                              for model in (ours, theirs, with_experts))
    assert round(published / 1e6) == millions
    # ours has a norm per output; theirs one on the last, and a classifier
    width = ours.embed_dims[-1]
    assert count - 2 * sum(ours.embed_dims) == published - (
        2 * width + 1001 * width - width + 1000)
    # residuals of 8 experts (8 D^2 + 5 D each) and a router (8 D) per layer
    assert more - count == sum(
        len(blocks) * 8 * (8 * d * d + 6 * d)
        for blocks, d in zip(moe['layers'], ours.embed_dims))


def test_strides_and_odd_images():
    with torch.device('meta'):
        model = CvTMoE(**SMALL)
        shapes = [[out.shape[1:] for out in model(torch.empty(1, 3, *size))]
                  for size in [(64, 96), (50, 83), (800, 1333)]]
    assert shapes == [[(16, 16, 24), (32, 8, 12), (64, 4, 6)],
                      [(16, 12, 21), (32, 6, 11), (64, 3, 6)],
                      [(16, 200, 333), (32, 100, 167), (64, 50, 84)]]


def build_moe(router=ROUTERS[0], **options):
    moe = dict(layers=((), (1, ), (0, 2)), num_experts=4,
               router=copy.deepcopy(router))
    return MODELS.build(dict(type='rmoe.CvTMoE', moe=moe,
                             **{**SMALL, **options}))


@pytest.mark.usefixtures('host_scope')
@pytest.mark.parametrize('router', ROUTERS, ids=lambda r: r['type'])
def test_upcycled_equals_dense_and_every_parameter_learns(router):
    dense, moe = randomise(CvTMoE(**SMALL)), build_moe(router)
    moe.load_state_dict(dense.state_dict())
    assert list(moe_layers(moe)) == [
        f'stages.{i}.blocks.{j}.ffn' for i, j in ((1, 1), (2, 0), (2, 2))]
    x = torch.randn(2, 3, 50, 66)
    for mode in (False, True):
        assert_equal_maps(moe.train(mode)(x), dense.train(mode)(x))
    sum(out.square().sum() for out in moe(x)).backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name


# Batch norm inside a checkpointed block moves its statistics twice.
@pytest.mark.parametrize('compare', ['gradients', pytest.param(
    'statistics', marks=pytest.mark.xfail(strict=True))])
def test_checkpointing_changes_nothing(compare):
    router = dict(type='TokenChoiceRouter', noise_std=0.)
    models = [randomise(build_moe(router)), build_moe(router, with_cp=True)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 48, 48)
    values = []
    for model in models:
        collect_losses(model.train(), start=True)
        outs = model(x)
        losses = collect_losses(model, start=False)
        (sum(out.square().mean() for out in outs) + sum(
            losses.values())).backward()
        # 6x6 tokens at stride 8; 3x3 and the class token at stride 16
        assert [int(layer.demand_E.sum()) for layer in
                moe_layers(model).values()] == [72, 20, 20]
        values.append(dict(model.named_buffers()) if compare == 'statistics'
                      else {n: p.grad for n, p in model.named_parameters()})
    for name, value in values[0].items():
        torch.testing.assert_close(value, values[1][name], msg=name)


def test_drop_path_rises_inside_a_stage():
    model = CvTMoE(**{**SMALL, 'drop_path_rates': (.1, .2, .3)})
    assert [[round(block.drop.drop_prob, 6) for block in stage.blocks]
            for stage in model.stages] == [[0.], [0., .2], [0., .15, .3]]


def test_layer_depth():
    depth = CvTMoE(**SMALL).get_layer_depth  # six blocks: depths 0 to 7
    for name, expected in {
            'stages.0.patch_embed.projection.weight': 0,
            'stages.0.blocks.0.attn.conv_proj_q.bn.weight': 1,
            'stages.1.patch_embed.norm.bias': 1,
            'stages.1.blocks.1.ffn.router.scorer.weight': 3,
            'stages.2.cls_token': 3, 'stages.2.blocks.2.norm1.weight': 6,
            'norm0.weight': 7}.items():
        assert depth(f'backbone.{name}', 'backbone.') == (expected, 8), name
        assert depth(name) == (expected, 8), name
    assert depth('decode_head.stages.0.weight', 'backbone.') == (7, 8)


@torch.no_grad()
def test_dense_heads_take_the_maps():
    maps = build_moe()(torch.randn(2, 3, 64, 80))
    widths = list(SMALL['embed_dims'])
    head = UPerHead(in_channels=widths, in_index=[0, 1, 2], channels=8,
                    num_classes=5, pool_scales=(1, 2)).eval()
    assert head(maps).shape == (2, 5, 16, 20)
    neck = FPN(in_channels=widths, out_channels=8, num_outs=5,
               add_extra_convs='on_output')
    assert [tuple(out.shape[2:]) for out in neck(maps)] == [
        (16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]


@pytest.mark.parametrize('options, message', [
    (dict(arch='14'), r"arch='14' is not one of \('13', '21', 'w24'\)"),
    (dict(moe=dict(num_experts=2)), 'moe needs layers'),
    (dict(moe=dict(layers=((), (2, ), ()))), 'block 2; stage 1 has blocks 0'),
    (dict(moe=dict(layers=((), (), ()))), 'selects no block'),
    (dict(moe=dict(layers=((), (1, ), ()), expert_mismatch='drop')),
     "expert_mismatch='drop'"),
    (dict(out_indices=(0, 3)), 'out_indices points at stage 3; there are 3'),
    (dict(frozen_stages=4), 'frozen_stages=4 must lie between 0 and the 3'),
    *((dict({name: (1, 2)}), rf'{name}=\(1, 2\) must have one entry for each')
      for name in ('embed_dims', 'num_heads', 'patch_sizes', 'strides',
                   'patch_padding', 'drop_path_rates')),
], ids=str)
def test_bad_arguments_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        CvTMoE(**{**SMALL, **options})
