"""A model of each source of checkpoints, built at random, with its weights as
its files name them."""
import re
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
import transformers
from mmdet.models.backbones import SwinTransformer as MMDetSwin
from mmpretrain.models.backbones import SwinTransformer as MMPretrainSwin
from mmpretrain.models.backbones import VisionTransformer as MMPretrainViT
from mmseg.models.backbones import SwinTransformer as MMSegSwin
from mmseg.models.backbones import VisionTransformer as MMSegViT
from torch import Tensor, nn

from rmoe.backbones import CvTMoE, SwinMoE, ViTMoE
from rmoe.upcycling import read_checkpoint, state_dict_of

SWIN = dict(embed_dims=16, depths=(1, 2, 2), num_heads=(1, 2, 4),
            strides=(4, 2, 2), out_indices=(0, 1, 2), window_size=4,
            drop_path_rate=0.)
VIT = dict(embed_dims=24, num_layers=4, num_heads=2, mlp_dims=48,
           img_size=32, patch_size=8)
CVT = dict(embed_dims=(16, 32, 64), depths=(1, 2, 3), num_heads=(1, 2, 4))
SIZE = {SwinMoE: 64, ViTMoE: 32, CvTMoE: 61}
MOE_LAYERS = {SwinMoE: ((), (1, ), (0, 1)), ViTMoE: (1, 3),
              CvTMoE: ((), (1, ), (0, 2))}


def randomise(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, .5, 1.5)
    model.eval()
    return model


class Case(NamedTuple):
    """Their model, their maps of an image, the file's weights, our class and
    options, and the outputs on which ours has no norm as theirs has none."""
    model: nn.Module
    maps: Callable[[Tensor], list[Tensor]]
    state: dict[str, Tensor]
    ours: type
    options: dict
    bare: tuple[str, ...] = ()


def openmmlab(host_class, **options):
    model = randomise(host_class(**options))
    return model, lambda x: list(model(x)), model.state_dict()


def saved(model, folder):
    """The names of the file, which need not be those in memory."""
    model.save_pretrained(folder)
    return state_dict_of(read_checkpoint(folder / 'model.safetensors'))


def below(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items()
            if key.startswith(prefix)}


def mmseg_swin(_):
    return Case(*openmmlab(MMSegSwin, **SWIN), SwinMoE, SWIN)


def mmdet_swin(_):
    return Case(*openmmlab(MMDetSwin, **SWIN), SwinMoE, SWIN)


def mmpretrain_swin(_):
    model, maps, state = openmmlab(
        MMPretrainSwin, arch=dict(embed_dims=16, depths=(1, 2, 2),
                                  num_heads=(1, 2, 4)),
        img_size=64, window_size=4, out_indices=(0, 1, 2), pad_small_map=True,
        drop_path_rate=0., out_after_downsample=False)
    return Case(model, maps, state, SwinMoE, SWIN)


def timm_swin(_):
    model = randomise(timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, num_classes=5, embed_dim=16,
        depths=(1, 2, 2), num_heads=(1, 2, 4), window_size=4,
        drop_path_rate=0.))

    def maps(x):
        return model.forward_intermediates(x, norm=False,
                                           intermediates_only=True)

    return Case(model, maps, model.state_dict(), SwinMoE,
                dict(SWIN, shift_small_maps=False),
                ('norm0', 'norm1', 'norm2'))


def original_swin(_):
    """timm's model, whose weights the original release names so."""
    case = timm_swin(_)
    state = {}
    for key, value in case.state.items():
        parts = key.split('.')
        if parts[2:3] == ['downsample']:
            parts[1] = str(int(parts[1]) - 1)
        state['.'.join(parts).replace('head.fc.', 'head.')] = value
    state['layers.1.blocks.1.attn_mask'] = torch.zeros(1)
    return case._replace(state=state)


def hf_swin(folder):
    model = randomise(transformers.SwinBackbone(transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 2, 2], num_heads=[1, 2, 4],
        window_size=4, drop_path_rate=0.,
        out_features=['stage1', 'stage2', 'stage3'])))
    return Case(model, lambda x: list(model(x).feature_maps),
                saved(model, folder), SwinMoE, SWIN)


def _mmseg_vit(**options):
    return openmmlab(
        MMSegViT, img_size=32, patch_size=8, embed_dims=24, num_layers=4,
        num_heads=2, mlp_ratio=2, final_norm=True, **options)


def mmseg_vit(_):
    model, maps, state = _mmseg_vit(
        patch_bias=True, norm_cfg=dict(type='LN', eps=1e-6))
    return Case(model, maps, state, ViTMoE, VIT)


def _mmpretrain_vit(**options):
    return openmmlab(
        MMPretrainViT, arch=dict(
            embed_dims=24, num_layers=4, num_heads=2,
            feedforward_channels=48),
        img_size=32, patch_size=8, out_type='featmap', **options)


def mmpretrain_vit(_):
    model, maps, state = _mmpretrain_vit(
        norm_cfg=dict(type='LN', eps=1e-6), layer_scale_init_value=1.)
    return Case(model, maps, state, ViTMoE,
                dict(VIT, layer_scale_init_value=1.))


def _timm_vit(**options):
    model = randomise(timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2,
        mlp_ratio=2, num_classes=5, **options))

    def maps(x):
        return model.forward_intermediates(x, indices=1, norm=True,
                                           intermediates_only=True)

    return model, maps, model.state_dict()


def timm_vit(_):
    return Case(*_timm_vit(), ViTMoE, VIT)


def deit3(_):
    model, maps, state = _timm_vit(no_embed_class=True, init_values=1.)
    # the names of the original release
    state = {key.replace('ls1.gamma', 'gamma_1').replace(
        'ls2.gamma', 'gamma_2'): value for key, value in state.items()}
    return Case(model, maps, state, ViTMoE,
                dict(VIT, layer_scale_init_value=1.))


def dinov2(_):
    model, maps, state = _timm_vit(init_values=1.)
    state = {key: value for key, value in state.items()
             if not key.startswith('head')}
    state['mask_token'] = torch.zeros(1, 24)
    return Case(model, maps, state, ViTMoE,
                dict(VIT, layer_scale_init_value=1.))


def _hf_map(model):
    def maps(x):
        tokens = model(x).last_hidden_state[:, 1:]
        return [tokens.transpose(1, 2).unflatten(2, (4, 4))]

    return maps


def hf_vit(folder):
    model = randomise(transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=48, image_size=32, patch_size=8)))
    return Case(model, _hf_map(model.vit), below(saved(model, folder),
                                                 'vit.'), ViTMoE, VIT)


def hf_dinov2(folder):
    model = randomise(transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2,
        mlp_ratio=2, image_size=32, patch_size=8)))
    return Case(model, _hf_map(model), saved(model, folder), ViTMoE,
                dict(VIT, layer_scale_init_value=1.))


CLIP = dict(VIT, pre_norm=True, patch_bias=False,
            act_cfg=dict(type='rmoe.QuickGELU'),
            norm_cfg=dict(type='LN', eps=1e-5))


def timm_clip(_):
    model, maps, state = _timm_vit(
        pre_norm=True, norm_layer=nn.LayerNorm,
        act_layer=timm.layers.QuickGELU)
    assert 'norm_pre.weight' in state
    return Case(model, maps, state, ViTMoE, CLIP)


def mmseg_clip(_):
    model, maps, state = _mmseg_vit(
        pre_norm=True, norm_cfg=dict(type='LN', eps=1e-5),
        act_cfg=dict(type='mmseg.QuickGELU'))
    return Case(model, maps, state, ViTMoE, CLIP)


def mmpretrain_clip(_):
    model, maps, state = _mmpretrain_vit(
        pre_norm=True, patch_cfg=dict(bias=False),
        norm_cfg=dict(type='LN', eps=1e-5))
    return Case(model, maps, state, ViTMoE,
                dict(CLIP, act_cfg=dict(type='GELU')))


def hf_clip(folder):
    model = randomise(transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=24, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=48, image_size=32, patch_size=8)))

    def maps(x):
        # theirs applies the last norm to the class token alone
        tokens = model.vision_model.post_layernorm(
            model(x).last_hidden_state[:, 1:])
        return [tokens.transpose(1, 2).unflatten(2, (4, 4))]

    return Case(model, maps, below(saved(model, folder), 'vision_model.'),
                ViTMoE, CLIP)


def open_clip(folder):
    """Hugging Face's model, whose weights the releases name so."""
    case = hf_clip(folder)
    state = {}
    for key, value in case.state.items():
        key = key.replace('embeddings.', '').replace(
            'position_embedding.weight', 'positional_embedding').replace(
            'patch_embedding', 'conv1').replace('pre_layrnorm', 'ln_pre')
        key = key.replace('post_layernorm', 'ln_post').replace(
            'encoder.layers', 'transformer.resblocks').replace(
            'layer_norm', 'ln_').replace('self_attn', 'attn').replace(
            'mlp.fc1', 'mlp.c_fc').replace('mlp.fc2', 'mlp.c_proj')
        state[key] = value
    for number in range(4):
        block = f'transformer.resblocks.{number}.attn.'
        for part in ('weight', 'bias'):
            state[f'{block}in_proj_{part}'] = torch.cat([
                state.pop(f'{block}{name}_proj.{part}') for name in 'qkv'])
    state['proj'] = torch.zeros(24, 4)
    return case._replace(state=state)


def hf_cvt(folder):
    model = randomise(transformers.CvtModel(transformers.CvtConfig(
        embed_dim=[16, 32, 64], depth=[1, 2, 3], num_heads=[1, 2, 4])))

    def maps(x):
        return list(model(x, output_hidden_states=True).hidden_states)

    return Case(model, maps, saved(model, folder), CvTMoE,
                dict(CVT, act_cfg=dict(type='GELU')),
                ('norm0', 'norm1', 'norm2'))


class QuickGELU(nn.Module):

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ORIGINAL_CVT = (
    ('encoder.stages.', 'stage'), ('.layers.', '.blocks.'),
    ('embedding.convolution_embeddings.projection', 'patch_embed.proj'),
    ('embedding.convolution_embeddings.normalization', 'patch_embed.norm'),
    ('.convolution_projection.convolution', '.conv'),
    ('.convolution_projection.normalization', '.bn'),
    ('attention.attention.convolution_projection_query', 'attn.conv_proj_q'),
    ('attention.attention.convolution_projection_key', 'attn.conv_proj_k'),
    ('attention.attention.convolution_projection_value', 'attn.conv_proj_v'),
    ('attention.attention.projection_query', 'attn.proj_q'),
    ('attention.attention.projection_key', 'attn.proj_k'),
    ('attention.attention.projection_value', 'attn.proj_v'),
    ('attention.output.dense', 'attn.proj'),
    ('intermediate.dense', 'mlp.fc1'), ('output.dense', 'mlp.fc2'),
    ('layernorm_before', 'norm1'), ('layernorm_after', 'norm2'))


def original_cvt(folder):
    """Hugging Face's model, with the release's activation and names."""
    case = hf_cvt(folder)
    for module in list(case.model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == 'GELUActivation' or isinstance(
                    child, nn.GELU):
                setattr(module, name, QuickGELU())
    state = {}
    for key, value in case.state.items():
        for theirs, ours in ORIGINAL_CVT:
            key = key.replace(theirs, ours)
        state[key] = value
    state['norm.weight'] = state['head.bias'] = torch.zeros(1)
    return case._replace(state=state, options=CVT)


def dinov2_training(_):
    """Blocks in chunks of two, counted through."""
    case = dinov2(_)
    return case._replace(state={
        re.sub(r'blocks\.(\d+)', lambda match: 'blocks.'
               f'{int(match[1]) // 2}.{match[1]}', key): value
        for key, value in case.state.items()})


SOURCES = {
    'mmseg, mmdet or mmpretrain Swin': (mmseg_swin, mmdet_swin,
                                        mmpretrain_swin),
    'timm Swin': (timm_swin, ),
    'original Swin release': (original_swin, ),
    'Hugging Face Swin': (hf_swin, ),
    'mmseg ViT': (mmseg_vit, mmseg_clip),
    'mmpretrain ViT': (mmpretrain_vit, mmpretrain_clip),
    'timm, DeiT or DINOv2 ViT': (timm_vit, deit3, dinov2, timm_clip),
    'CLIP or OpenCLIP visual tower': (open_clip, ),
    'Hugging Face CLIP visual tower': (hf_clip, ),
    'DINOv2 training checkpoint': (dinov2_training, ),
    'Hugging Face ViT': (hf_vit, ),
    'Hugging Face DINOv2': (hf_dinov2, ),
    'Hugging Face CvT': (hf_cvt, ),
    'original CvT release': (original_cvt, ),
}
