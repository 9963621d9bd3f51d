"""A model of each source, built at random: its weights through the file and
the real loading path, features compared. One row for each source."""

import pytest
import torch
from sources import (
    CLIP,
    MOE_LAYERS,
    SIZE,
    SOURCES,
    VIT,
    dinov2,
    hf_clip,
    hf_vit,
    mmseg_clip,
    mmseg_vit,
    open_clip,
    timm_clip,
    timm_swin,
    timm_vit,
)
from torch import nn

from rmoe.backbones import ViTMoE
from rmoe.moe import moe_layers
from rmoe.upcycling import fit, read_checkpoint, state_dict_of
from rmoe.upcycling.keymaps import ARCHITECTURES

# These have files of their own to read, and tests of their own.
ELSEWHERE = {'Microsoft Swin-MoE', 'Google V-MoE or ViT (Flax)', 'rmoe CvT'}
CASES = [(source, case) for source, cases in SOURCES.items()
         for case in cases]


def test_every_source_is_tested():
    known = {source.name for architecture in ARCHITECTURES
             for source in architecture.sources}
    assert known == set(SOURCES) | ELSEWHERE


@pytest.mark.parametrize('moe', [False, True], ids=['dense', 'moe'])
@pytest.mark.parametrize('source, build', CASES,
                         ids=[build.__name__ for _, build in CASES])
def test_features_equal_the_source(source, build, moe, tmp_path):
    case = build(tmp_path)
    experts = dict(layers=MOE_LAYERS[case.ours], num_experts=4,
                   router=dict(type='TokenChoiceRouter', noise_std=0.))
    ours = case.ours(**case.options, moe=experts if moe else None).eval()
    for name in case.bare:
        setattr(ours, name, nn.Identity())
    torch.save(case.state, tmp_path / 'theirs.pth')
    state = state_dict_of(read_checkpoint(tmp_path / 'theirs.pth'))
    fitted, report = fit(ours, state)
    assert report.source == source
    assert set(report.status) == set(ours.state_dict()) == set(fitted)
    ours.load_state_dict(state)
    assert len(moe_layers(ours)) == (0 if not moe else 2 if
                                     case.ours is ViTMoE else 3)
    x = torch.randn(2, 3, *(2 * [SIZE[case.ours]]))
    with torch.no_grad():
        for a, b in zip(ours(x), case.maps(x), strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_files_give_float32_models(dtype, tmp_path):
    case = timm_vit(tmp_path)
    half = {key: value.to(dtype) for key, value in case.state.items()}
    ours = case.ours(**case.options)
    for key, value in fit(ours, half)[0].items():
        assert value.dtype == torch.float32, key
    ours.load_state_dict(half)
    assert torch.equal(ours.layers[0].attn.attn.in_proj_weight,
                       half['blocks.0.attn.qkv.weight'].float())


@pytest.mark.parametrize('image, patches', [(48, 36), (24, 9)])
def test_position_embedding_resizes_to_the_image(image, patches, tmp_path):
    case = timm_vit(tmp_path)
    ours = case.ours(**dict(case.options, img_size=image)).eval()
    fitted, report = fit(ours, case.state)
    assert report.status['pos_embed'] == 'resized'
    assert fitted['pos_embed'].shape == (1, 1 + patches, 24)
    case.model.set_input_size((image, image))  # timm's own resizing
    torch.testing.assert_close(fitted['pos_embed'], case.model.pos_embed)


def test_a_class_token_can_be_left_out(tmp_path):
    case = timm_vit(tmp_path)
    ours = case.ours(**case.options, with_cls_token=False)
    fitted, report = fit(ours, case.state)
    assert torch.equal(fitted['pos_embed'], case.state['pos_embed'][:, 1:])
    assert report.left_out['cls_token'].startswith('class token')


class TestBadFiles:

    def vit(self, **options):
        return ViTMoE(**dict(VIT, **options))

    def test_two_sources_at_once(self, tmp_path):
        state = {**mmseg_vit(tmp_path).state, **timm_vit(tmp_path).state}
        with pytest.raises(ValueError, match=r'two sources.*mmseg ViT.*timm'):
            fit(self.vit(), state)

    def test_of_no_known_source(self):
        with pytest.raises(ValueError, match=r"no source.*mmseg ViT.*'a.b'"):
            fit(self.vit(), {'a.b': torch.zeros(1)})

    def test_of_another_architecture(self, tmp_path):
        with pytest.raises(ValueError, match=r'that of a timm Swin.*is a ViT'):
            fit(self.vit(), timm_swin(tmp_path).state)

    def test_fused_qkv_of_the_wrong_width(self, tmp_path):
        state = timm_vit(tmp_path).state
        state['blocks.1.attn.qkv.weight'] = torch.zeros(71, 24)
        with pytest.raises(ValueError, match=r'layers.1.attn.attn.in_proj_'
                           r'weight has shape \(71, 24\).*\(72, 24\)'):
            fit(self.vit(), state)

    def test_a_part_of_qkv_is_missing(self, tmp_path):
        state = hf_vit(tmp_path).state
        del state['encoder.layer.2.attention.attention.key.bias']
        with pytest.raises(ValueError, match=r'3 parts that layers.2.attn.'
                           r'attn.in_proj_bias .*numbers \[1\]'):
            fit(self.vit(), state)

    @pytest.mark.parametrize('key, message', [
        ('reg_token', 'the model has no register tokens'),
        ('dist_token', 'the model has no distillation token'),
        ('some_token', "'some_token' is no weight of a")])
    def test_tokens_the_model_has_not(self, key, message, tmp_path):
        state = timm_vit(tmp_path).state
        state[key] = torch.zeros(1, 1, 24)
        with pytest.raises(ValueError, match=message):
            fit(self.vit(), state)

    def test_layer_scale_the_model_has_not(self, tmp_path):
        with pytest.raises(ValueError, match=r'gamma1.weight .* no place'):
            fit(self.vit(), dinov2(tmp_path).state)

    def test_nothing_is_loaded_of_a_bad_file(self, tmp_path):
        state = timm_vit(tmp_path).state
        state['blocks.3.mlp.fc2.bias'] = torch.zeros(25)
        model = self.vit()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=r'layers.3.ffn.layers.1.bias'):
            model.load_state_dict(state, strict=False)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize('build, change, message', [
    (timm_clip, VIT, r'set pre_norm=True, patch_bias=False in the backbone'),
    (hf_clip, dict(CLIP, patch_bias=True), r'set patch_bias=False in the'),
    (open_clip, dict(CLIP, pre_norm=False), r'set pre_norm=True in the'),
    (mmseg_clip, VIT, r'set pre_norm=True, patch_bias=False in the backbone'),
    (timm_vit, CLIP, r'set pre_norm=False, patch_bias=True in the backbone'),
])
def test_a_norm_before_the_blocks_is_as_the_file_says(build, change, message,
                                                      tmp_path):
    case = build(tmp_path)
    with pytest.raises(ValueError, match=message):
        ViTMoE(**change).load_state_dict(case.state)


@pytest.mark.parametrize('build, prefix', [
    (open_clip, 'visual.'), (hf_clip, 'vision_model.')])
def test_the_visual_tower_of_a_whole_clip_is_found(build, prefix, tmp_path):
    state = build(tmp_path).state
    whole = {f'{prefix}{key}': value for key, value in state.items()}
    for tower in ('transformer.resblocks.0.attn.in_proj_weight',
                  'text_model.encoder.layers.0.self_attn.q_proj.weight',
                  'logit_scale'):
        whole[tower] = torch.zeros(2, 2)
    torch.save(whole, tmp_path / 'clip.pth')
    ours = ViTMoE(**CLIP, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'clip.pth')))
    ours.init_weights()
    for key, value in fit(ours, state)[0].items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_the_norm_before_the_blocks_freezes_with_the_embeddings():
    ours = ViTMoE(**CLIP, frozen_stages=0)
    assert not any(p.requires_grad for p in ours.ln_pre.parameters())
    assert ours.get_layer_depth('backbone.ln_pre.weight', 'backbone.') == (
        0, 6)
