"""Files of pre-training runs and wrapped models, as they are in the wild:
each loads by itself through init_cfg, and says what it took."""
import os
import pickle
import stat

import numpy as np
import pytest
import timm
import torch
import transformers
from sources import SWIN as SWIN_OPTIONS
from sources import VIT as VIT_OPTIONS
from sources import mmpretrain_swin, original_swin, timm_vit

from rmoe.backbones import SwinMoE, ViTMoE
from rmoe.upcycling import (
    choose_weights,
    fit,
    read_checkpoint,
    state_dict_of,
    write_atomically,
    write_checkpoint,
)
from rmoe.upcycling.keymaps import VIT

SMALL_VIT = dict(VIT_OPTIONS, moe=dict(layers=(1, ), num_experts=2))
SMALL_SWIN = dict(SWIN_OPTIONS, moe=dict(layers=((), (1, ), ()),
                                         num_experts=2))


TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, image_size=32, patch_size=8)


def below(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def other(state):
    return {key: value + 1 if value.is_floating_point() else value
            for key, value in state.items()}


def simmim(prefix):
    def build(_):
        case = original_swin(_) if prefix == 'encoder.' else mmpretrain_swin(_)
        state = {key: value for key, value in case.state.items()
                 if not key.startswith('head')}
        state['mask_token'] = torch.zeros(1, 1, 16)
        decoder = 'decoder.0.' if prefix == 'encoder.' else 'neck.decoder.0.'
        return dict(model={**below(prefix, state),
                           decoder + 'weight': torch.zeros(4, 4)},
                    optimizer=dict(state={}), epoch=799), case.state
    return build


def mae(_):
    state = timm_vit(_).state
    return dict(model={
        **state, 'mask_token': torch.zeros(1, 1, 24),
        'decoder_pos_embed': torch.zeros(1, 17, 16),
        'decoder_embed.weight': torch.zeros(16, 24),
        'decoder_blocks.0.attn.qkv.weight': torch.zeros(48, 16),
        'decoder_norm.weight': torch.zeros(16),
        'decoder_pred.bias': torch.zeros(3)}), state


def dino(_):
    state = timm_vit(_).state
    bare = {key: value for key, value in state.items()
            if not key.startswith('head')}
    head = {'head.mlp.0.weight': torch.zeros(8, 24),
            'head.last_layer.weight_v': torch.zeros(8, 4)}
    ibot = {'backbone.masked_embed': torch.zeros(1, 24)}
    return dict(
        student=below('module.', {**below('backbone.', other(bare)), **head}),
        teacher={**below('backbone.', bare), **head, **ibot},
        optimizer=dict(state={0: dict(exp_avg=torch.zeros(2, 2))}), epoch=100,
        dino_loss=dict(center=torch.zeros(1, 8))), state


def esvit(_):
    state = original_swin(_).state
    bare = {key: value for key, value in state.items()
            if not key.startswith('head')}
    heads = {'module.head.mlp.0.weight': torch.zeros(8, 8),
             'module.head_dense.mlp.0.weight': torch.zeros(8, 8)}
    return dict(student={**below('module.backbone.', other(bare)), **heads},
                teacher={**below('module.backbone.', bare), **heads}), state


def moco_v3(_):
    state = timm_vit(_).state
    return dict(arch='vit_small', state_dict={
        **below('module.base_encoder.', state),
        **below('module.momentum_encoder.', other(state)),
        'module.predictor.0.weight': torch.zeros(2, 2)}), state


def timm_ema(_):
    state = timm_vit(_).state
    return dict(state_dict=other(state), state_dict_ema=state, epoch=3), state


def compiled(prefix):
    def build(_):
        state = timm_vit(_).state
        return dict(model=below(prefix, state)), state
    return build


def fsdp(_):
    state = timm_vit(_).state
    return dict(model={
        '_fsdp_wrapped_module.' + key.replace(
            'blocks.1.', 'blocks.1._checkpoint_wrapped_module.'): value
        for key, value in state.items()}), state


def i_jepa(_):
    state = timm_vit(_).state
    return dict(encoder=below('module.', other(state)),
                target_encoder=below('module.', state),
                predictor=below('module.', {'a.weight': torch.ones(2, 2)}),
                opt=dict(state={})), state


def ema_model(_):
    state = timm_vit(_).state
    return dict(model=other(state), ema_model=state), state


def averaged(_):
    """torch.optim.swa_utils.AveragedModel"""
    state = timm_vit(_).state
    return {'n_averaged': torch.tensor(7), **below('module.', state)}, state


def mean_teacher(_):
    state = timm_vit(_).state
    return dict(state_dict={
        **below('student_backbone.', other(state)),
        **below('teacher_backbone.', state)}), state


VITS = (ema_model, averaged, mean_teacher, mae, dino, moco_v3, timm_ema,
        compiled('_orig_mod.'), compiled('module._orig_mod.module.'),
        compiled('_forward_module.'), fsdp, i_jepa)
SWINS = (simmim('encoder.'), simmim('backbone.'), esvit)
CASES = [*((ViTMoE, SMALL_VIT, build) for build in VITS),
         *((SwinMoE, SMALL_SWIN, build) for build in SWINS)]


def load(kind, options, path, **choice):
    model = kind(**options, init_cfg=dict(
        type='Pretrained', checkpoint=str(path), **choice))
    model.init_weights()
    return model


@pytest.mark.parametrize('kind, options, build', CASES)
def test_a_file_loads_by_itself(kind, options, build, tmp_path):
    content, expected = build(tmp_path)
    torch.save(content, tmp_path / 'file.pth')
    model = load(kind, options, tmp_path / 'file.pth')
    fitted, _ = fit(kind(**options), expected)
    for key, value in model.state_dict().items():
        if '.router.' not in key and not key.startswith('norm'):
            assert torch.equal(value, fitted[key]), key
    assert isinstance(model.init_cfg, dict)


@pytest.mark.parametrize('build, weights', [
    (dino, 'student'), (moco_v3, 'momentum_encoder'),
    (timm_ema, 'state_dict'), (i_jepa, 'encoder'), (ema_model, 'model'),
    (mean_teacher, 'student')])
def test_the_other_choice(build, weights, tmp_path):
    content, expected = build(tmp_path)
    torch.save(content, tmp_path / 'file.pth')
    model = load(ViTMoE, SMALL_VIT, tmp_path / 'file.pth', weights=weights)
    assert torch.equal(model.patch_embed.projection.weight,
                       expected['patch_embed.proj.weight'] + 1)


def test_a_choice_that_is_not_there(tmp_path):
    torch.save(dino(tmp_path)[0], tmp_path / 'file.pth')
    with pytest.raises(ValueError, match=r"file.pth: weights='ema' are not.*"
                       r"\['teacher', 'student'\]"):
        load(ViTMoE, SMALL_VIT, tmp_path / 'file.pth', weights='ema')


@pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
def test_a_prefix_says_where(prefix, tmp_path):
    content, expected = dino(tmp_path)
    torch.save(content, tmp_path / 'file.pth')
    model = load(ViTMoE, SMALL_VIT, tmp_path / 'file.pth', prefix=prefix)
    assert torch.equal(model.patch_embed.projection.weight,
                       expected['patch_embed.proj.weight'])


def test_the_name_of_a_wrapper_as_prefix(tmp_path):
    content, expected = compiled('module.')(tmp_path)
    torch.save(dict(state_dict=content['model']), tmp_path / 'file.pth')
    model = load(ViTMoE, SMALL_VIT, tmp_path / 'file.pth', prefix='module.')
    assert torch.equal(model.patch_embed.projection.weight,
                       expected['patch_embed.proj.weight'])


def test_one_line_says_what_was_taken(tmp_path):
    choice = choose_weights(dino(tmp_path)[0], VIT)
    assert choice.pretraining
    assert choice.line == (
        "took 55 weights of 'teacher' under the prefix 'backbone.'; left out "
        "'student', head (2), optimizer, epoch, dino_loss; "
        "weights='student' takes the other")
    assert choose_weights(timm_vit(tmp_path).state, VIT).line == ''


@pytest.mark.parametrize('name', [
    'module.module.a.b', '_orig_mod.a.b', 'module._orig_mod.a.b',
    '_forward_module.a._orig_mod.b', 'a._checkpoint_wrapped_module.b',
    '_fsdp_wrapped_module.a._fsdp_wrapped_module.b'])
def test_names_of_wrappers(name):
    assert set(state_dict_of({name: torch.zeros(1)})) == {'a.b'}


def test_names_that_would_become_one_stay():
    state = {'module.a': torch.zeros(1), 'a': torch.ones(1)}
    assert set(state_dict_of(state)) == {'module.a', 'a'}


def test_several_unknown_sets_are_not_guessed():
    state = {f'{i}.weight': torch.zeros(2, 2) for i in range(4)}
    assert set(state_dict_of(dict(net=state))) == set(state)
    with pytest.raises(ValueError, match=r"\['net_a', 'net_b'\]: choose one"):
        state_dict_of(dict(net_a=state, net_b=state))


ARRAYS = {'a.weight': np.arange(6, dtype='f4').reshape(2, 3),
          'a.turned': np.asfortranarray(np.arange(6.).reshape(2, 3)),
          'a.big': np.arange(3, dtype='>f4'),
          'a.count': np.array(7)}


class TestArrays:

    @pytest.mark.parametrize('protocol', [2, 4, 5])
    @pytest.mark.parametrize('old', [False, True])
    def test_detectron2(self, protocol, old, tmp_path):
        data = pickle.dumps(dict(model=ARRAYS, __author__='Third Party',
                                 matching_heuristics=True), protocol)
        if old and protocol == 2:  # where numpy 1 had its functions
            data = data.replace(b'numpy._core', b'numpy.core')
        (tmp_path / 'model.pkl').write_bytes(data)
        state = state_dict_of(read_checkpoint(tmp_path / 'model.pkl'))
        assert set(state) == set(ARRAYS)
        for key, array in ARRAYS.items():
            assert np.array_equal(state[key].numpy(), array), key

    def test_tensors_in_a_plain_pickle(self, tmp_path):
        # What detectron2 projects make of Swin's release.
        content, expected = compiled('')(tmp_path)
        (tmp_path / 'a.pkl').write_bytes(pickle.dumps(content))
        model = load(ViTMoE, SMALL_VIT, tmp_path / 'a.pkl')
        assert torch.equal(model.patch_embed.projection.weight,
                           expected['patch_embed.proj.weight'])

    def test_nothing_is_executed(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'trace'), )

        for content in (dict(model=ARRAYS, x=Hostile()), Hostile(),
                        dict(model=np.array([Hostile()], dtype=object))):
            (tmp_path / 'a.pkl').write_bytes(pickle.dumps(content))
            with pytest.raises(ValueError, match=r'a.pkl asks for .*mkdir'):
                read_checkpoint(tmp_path / 'a.pkl')
        assert not (tmp_path / 'trace').exists()

    def test_no_codec_is_imported(self, tmp_path):
        import codecs

        class Coded:
            def __reduce__(self):
                return codecs.encode, ('x', 'rot13')

        (tmp_path / 'a.pkl').write_bytes(pickle.dumps(dict(a=Coded())))
        with pytest.raises(ValueError, match='rot13'):
            read_checkpoint(tmp_path / 'a.pkl')

    def test_cut_short(self, tmp_path):
        data = pickle.dumps(dict(model=ARRAYS))
        (tmp_path / 'a.pkl').write_bytes(data[:-60])
        with pytest.raises(ValueError, match=r'a\.pkl is corrupt'):
            read_checkpoint(tmp_path / 'a.pkl')


QKV = 'blocks.0.attn.qkv.weight'


class TestRefused:

    @pytest.mark.parametrize('name, keys', [
        ('SAM or ViTDet', ['image_encoder.pos_embed', f'image_encoder.{QKV}',
                           'image_encoder.patch_embed.proj.weight',
                           'image_encoder.blocks.0.attn.rel_pos_h']),
        ('DINOv3', [QKV, 'patch_embed.proj.weight', 'storage_tokens',
                    'rope_embed.periods']),
        ('DINOv3', ['embeddings.register_tokens',
                    'layer.0.attention.q_proj.weight']),
        ('DINOv2 with registers', [QKV, 'patch_embed.proj.weight',
                                   'pos_embed', 'register_tokens']),
        ('BEiT, data2vec', [QKV, 'blocks.0.attn.q_bias',
                            'patch_embed.proj.weight']),
        ('BEiT, data2vec', [
            'data2vec_vision.encoder.layer.0.lambda_1',
            'data2vec_vision.encoder.layer.0.attention.attention.query.'
            'weight',
            'data2vec_vision.encoder.layer.0.intermediate.dense.weight']),
        ('data2vec 2.0', [
            QKV, 'modality_encoders.IMAGE.local_encoder.proj.weight']),
        ('CLIP', ['visual.ln_pre.weight', 'visual.conv1.weight']),
        ('CLIP', ['vision_model.pre_layrnorm.weight']),
        ('Swin Transformer V2', ['layers.0.blocks.0.attn.logit_scale',
                                 'layers.0.blocks.0.attn.q_bias'])])
    def test_by_name(self, name, keys, tmp_path):
        state = {key: torch.zeros(4, 4) for key in keys}
        torch.save(dict(model=state), tmp_path / 'file.pth')
        for kind, options in ((ViTMoE, SMALL_VIT), (SwinMoE, SMALL_SWIN)):
            with pytest.raises(ValueError, match=f'file.pth: the checkpoint '
                               f'is that of .*{name}'):
                load(kind, options, tmp_path / 'file.pth')

    @pytest.mark.parametrize('name, build', [
        ('SAM or ViTDet encoder', lambda: transformers.SamModel(
            transformers.SamConfig(vision_config=dict(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                image_size=32, output_channels=8)))),
        ('SAM 2 or Hiera encoder', lambda: transformers.HieraModel(
            transformers.HieraConfig(
                embed_dim=16, image_size=[64, 64], depths=[1, 1, 1],
                num_heads=[1, 2, 4], num_layers=3, masked_unit_size=[4, 4],
                query_stride=[2, 2], num_query_pool=2))),
        ('SAM 2 or Hiera encoder', lambda: timm.create_model(
            'hiera_tiny_224', embed_dim=16, img_size=64)),
        ('distilled DeiT',
         lambda: transformers.DeiTModel(transformers.DeiTConfig(**TINY))),
        ('Swin Transformer V2', lambda: transformers.Swinv2Model(
            transformers.Swinv2Config(embed_dim=16, depths=[1],
                                      num_heads=[1], image_size=32))),
        ('SigLIP', lambda: timm.create_model(
            'vit_base_patch16_siglip_224', depth=1, embed_dim=16,
            num_heads=2, img_size=32)),
        (r'DINOv2 with gates', lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(**TINY, use_swiglu_ffn=True))),
        ('DINOv3', lambda: timm.create_model(
            'vit_small_patch16_dinov3', depth=1, embed_dim=32, num_heads=2,
            img_size=32)),
        ('DINOv2 with registers', lambda: timm.create_model(
            'vit_small_patch14_reg4_dinov2', depth=1, embed_dim=16,
            num_heads=2, img_size=28)),
    ])
    def test_real_models_by_name(self, name, build, tmp_path):
        torch.save(build().state_dict(), tmp_path / 'file.pth')
        for kind, options in ((ViTMoE, SMALL_VIT), (SwinMoE, SMALL_SWIN)):
            with pytest.raises(ValueError, match=f'is that of .*{name}'):
                load(kind, options, tmp_path / 'file.pth')

    def test_pieces_of_deepspeed(self, tmp_path):
        path = tmp_path / 'zero_pp_rank_0_mp_rank_00_optim_states.pt'
        torch.save({}, path)
        with pytest.raises(ValueError, match=r'zero_to_fp32\.py'):
            read_checkpoint(path)
        with pytest.raises(ValueError, match='folder of DeepSpeed ZeRO'):
            read_checkpoint(tmp_path)
        with pytest.raises(ValueError, match='2 of the 2 weights are empty'):
            state_dict_of(dict(module={'a.weight': torch.zeros(0),
                                       'a.bias': torch.zeros(0)}))

    def test_a_folder_of_torch(self, tmp_path):
        (tmp_path / '__0_0.distcp').write_bytes(b'x')
        with pytest.raises(ValueError, match='dcp_to_torch'):
            read_checkpoint(tmp_path)

    def test_a_program(self, tmp_path):
        path = tmp_path / 'clip.pt'
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
        with pytest.raises(ValueError, match='TorchScript'):
            read_checkpoint(path)


@pytest.mark.parametrize('change, command', [
    (dict(embed_dims=48), r'model.backbone.embed_dims="24"'),
    (dict(num_layers=5), r'model.backbone.num_layers="4"'),
    (dict(mlp_dims=96), r'model.backbone.mlp_dims="48"')])
def test_an_error_is_a_screen_and_says_what_to_type(change, command,
                                                    tmp_path):
    model = ViTMoE(**dict(VIT_OPTIONS, **change))
    with pytest.raises(ValueError, match=command) as error:
        model.load_state_dict(timm_vit(tmp_path).state)
    lines = str(error.value).split('\n')
    assert len(lines) <= 9
    assert 'timm, DeiT or DINOv2 ViT' in lines[1]
    assert lines[2].strip().startswith('model: ViT')


def test_depths_of_swin_in_the_command(tmp_path):
    model = SwinMoE(**dict(SWIN_OPTIONS, depths=(1, 2, 4)))
    with pytest.raises(ValueError, match=r'depths="\(1,2,2\)"'):
        model.load_state_dict(original_swin(tmp_path).state)


@pytest.mark.skipif(os.name != 'posix', reason='permissions of POSIX')
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors', '.json'])
@pytest.mark.parametrize('umask', [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask(umask, suffix, tmp_path):
    before = os.umask(umask)
    try:
        path = tmp_path / f'file{suffix}'
        if suffix == '.json':
            write_atomically(path, b'{}')
        else:
            write_checkpoint(path, {'a': torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
