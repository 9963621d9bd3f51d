"""Backbones of transformers with experts, against their dense models."""
import builtins

import pytest
import torch
from mmengine.config import ConfigDict
from torch import nn

from rmoe.backbones import HuggingFaceBackbone
from rmoe.moe import collect_losses, moe_layers
from rmoe.registry import MODELS
from rmoe.upcycling import choose_weights, fit, to_dense

transformers = pytest.importorskip('transformers')
DINO = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            image_size=32, patch_size=8, out_indices=(1, 3))
CONFIGS = {
    'DINOv2': dict(DINO, model_type='dinov2'),
    'DINOv2 with gates': dict(DINO, model_type='dinov2', use_swiglu_ffn=True),
    'DINOv2 with registers': dict(DINO, model_type='dinov2_with_registers'),
    'Swin': dict(model_type='swin', embed_dim=16, depths=[1, 2, 2],
                 num_heads=[1, 2, 4], window_size=4, image_size=64,
                 drop_path_rate=0., out_indices=(1, 3)),
    'BEiT': dict(DINO, model_type='beit', reshape_hidden_states=True,
                 add_fpn=False, use_mask_token=False, drop_path_rate=0.),
    'Hiera': dict(model_type='hiera', embed_dim=16, image_size=[64, 64],
                  depths=[1, 1, 1], num_heads=[1, 2, 4], num_layers=3,
                  masked_unit_size=[4, 4], query_stride=[2, 2],
                  num_query_pool=2, out_indices=(1, 3)),
    'ViTDet': dict(model_type='vitdet', hidden_size=16, num_hidden_layers=3,
                   num_attention_heads=2, image_size=64,
                   pretrain_image_size=64, window_block_indices=[0],
                   window_size=4, out_indices=(3, )),
}
every_model = pytest.mark.parametrize('name', CONFIGS)


def model_of(name, **moe):
    return HuggingFaceBackbone(CONFIGS[name], dict(
        dict(layers=(0, 2), num_experts=3), **moe) if moe else None)


def images(name):
    side = 64 if name in ('Swin', 'Hiera', 'ViTDet') else 32
    return torch.randn(2, 3, side, side)


@every_model
@pytest.mark.parametrize('options', [
    dict(core=True), dict(rank=2), dict(core=False)], ids=str)
@torch.no_grad()
def test_experts_start_as_the_dense_model(name, options):
    if options == dict(core=False) and name in ('Swin', 'BEiT'):
        with pytest.raises(ValueError, match='whose second half they share'):
            model_of(name, **options)
        return
    dense, moe = model_of(name).eval(), model_of(name, **options).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=.2)
    state = dense.state_dict()
    moe.load_state_dict(state)
    assert len(moe_layers(moe)) == 2
    x = images(name)
    outs = moe(x)
    assert [out.dim() for out in outs] == [4] * len(
        CONFIGS[name]['out_indices'])
    for a, b in zip(outs, dense(x), strict=True):
        assert (a - b).abs().max() < 1e-4
    for key, value in to_dense(moe).items():
        torch.testing.assert_close(value, state[key], msg=key)


@every_model
def test_every_expert_and_router_learns(name):
    moe = model_of(name, num_experts=3).train()
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=.2)
    collect_losses(moe, True)
    outs = moe(images(name))
    losses = collect_losses(moe, False)
    (sum(out.square().mean() for out in outs) + sum(losses.values())
     ).backward()
    for layer in moe_layers(moe).values():
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize('moe', [None, dict(layers=(0, ), num_experts=2)])
@pytest.mark.parametrize('prefix, given', [
    ('', False), ('dinov2.', False), ('dinov2.', True)])
def test_a_file_of_transformers_loads(tmp_path, moe, prefix, given):
    """Weights load from a file of the model alone and of a classifier."""
    kind = (transformers.Dinov2ForImageClassification if prefix
            else transformers.Dinov2Model)
    config = {key: value for key, value in DINO.items()
              if key != 'out_indices'}
    theirs = kind(transformers.Dinov2Config(**config))
    state = theirs.state_dict()
    torch.save(state, tmp_path / 'pytorch_model.bin')
    init_cfg = dict(type='Pretrained',
                    checkpoint=f'{tmp_path}/pytorch_model.bin')
    ours = HuggingFaceBackbone(
        CONFIGS['DINOv2'], moe,
        dict(init_cfg, prefix=prefix) if given else init_cfg)
    ours.init_weights()
    found = to_dense(ours) if moe else ours.state_dict()
    for key, value in found.items():
        assert torch.equal(
            value, state[prefix + key.removeprefix('model.')]), key


def test_a_file_of_another_depth_is_an_error(tmp_path):
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(
        **dict(DINO, num_hidden_layers=4, out_indices=None)))
    with pytest.raises(ValueError, match='has no place in the model'):
        model_of('DINOv2').load_state_dict(theirs.state_dict())


def test_it_is_the_backbone_of_a_segmentor():
    segmentor = MODELS.build(ConfigDict(
        type='mmseg.EncoderDecoder',
        backbone=dict(type='rmoe.HuggingFaceBackbone',
                      config=CONFIGS['DINOv2'],
                      moe=dict(layers=dict(every=2), num_experts=2)),
        decode_head=dict(type='mmseg.FCNHead', in_channels=16, channels=8,
                         in_index=1, num_classes=3, num_convs=1,
                         norm_cfg=dict(type='BN'),
                         loss_decode=dict(type='mmseg.CrossEntropyLoss'))))
    assert segmentor(images('DINOv2')).shape == (2, 3, 4, 4)
    before = [p.clone() for p in segmentor.backbone.parameters()]
    segmentor.backbone.init_weights()
    for a, b in zip(before, segmentor.backbone.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize('config, moe, message', [
    (DINO, None, 'config needs model_type'),
    (dict(DINO, model_type='dinov2', width=3), None, r"\['width'\], which"),
    (dict(model_type='resnet', embedding_size=8, hidden_sizes=[8],
          depths=[1]), dict(layers=(0, )), 'has no FFN that can become'),
    (CONFIGS['DINOv2'], dict(layers=(3, )), 'names FFN 3')])
def test_errors_name_the_value(config, moe, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceBackbone(config, moe)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == 'transformers':
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match='pip install transformers'):
        HuggingFaceBackbone(CONFIGS['DINOv2'])


@pytest.mark.parametrize('name, kind', [
    ('Swin', 'SwinForImageClassification'), ('Swin', 'SwinModel'),
    ('Hiera', 'HieraForImageClassification'), ('BEiT', 'BeitModel')])
def test_files_of_other_heads_load(tmp_path, name, kind):
    """transformers' backbones have norms that its other models do not
    have."""
    config = {key: value for key, value in CONFIGS[name].items()
              if key not in ('model_type', 'out_indices')}
    kind = getattr(transformers, kind)
    theirs = kind(kind.config_class(**config))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=.2)
    torch.save(theirs.state_dict(), tmp_path / 'a.bin')
    ours = HuggingFaceBackbone(
        CONFIGS[name], dict(layers=(0, ), num_experts=2),
        dict(type='Pretrained', checkpoint=str(tmp_path / 'a.bin')))
    ours.init_weights()
    found, state = to_dense(ours), theirs.state_dict()
    same = [key for key in state if any(
        torch.equal(state[key], value) for value in found.values()
        if value.shape == state[key].shape)]
    heads = ('classifier', 'layernorm', 'pooler')
    assert [key for key in state if not any(
        head in key for head in heads)] == [key for key in same if not any(
            head in key for head in heads)]
    prefix = next(key for key in state if key.endswith(
        'patch_embeddings.projection.bias')).partition('embeddings')[0]
    report = fit(ours, {key.removeprefix(prefix): value
                        for key, value in state.items()
                        if key.startswith(prefix)})[1]
    for key, status in report.status.items():
        assert (status == 'new') == ('hidden_states_norms' in key or
                                     '.experts.' in key or '.router.' in key)


def test_a_config_of_an_older_version_can_be_copied(caplog):
    config = dict(CONFIGS['DINOv2'], path_norm=True)
    with pytest.raises(ValueError, match=r"\['path_norm'\].*similar ones"):
        HuggingFaceBackbone(config)
    ours = HuggingFaceBackbone(dict(config, transformers_version='4.20.0'))
    assert not hasattr(ours.model.config, 'path_norm')


def test_a_name_inside_another_is_no_other_choice():
    ours = model_of('DINOv2')
    state = {f'backbone.{key}': value
             for key, value in ours.state_dict().items()}
    choice = choose_weights(dict(state_dict=state), ours.architecture)
    assert choice.prefix == 'backbone.' and len(choice.backbone) == len(state)
    assert 'left out' not in choice.line and 'weights=' not in choice.line
