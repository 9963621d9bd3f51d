"""Images of other than three channels, and weights for three."""
import pytest
import timm
import torch
from mmengine.logging import MMLogger
from timm.models import adapt_input_conv

from rmoe.backbones import CvTMoE, SwinMoE, ViTMoE
from rmoe.registry import MODELS
from rmoe.upcycling import fit
from rmoe.upcycling.channels import adapt_channels

MOE = dict(num_experts=2, router=dict(type='TokenChoiceRouter', noise_std=0.))
PROJECTION = 'patch_embed.projection.weight'


def swin(channels):
    return SwinMoE(embed_dims=16, depths=(1, 1), num_heads=(1, 2),
                   strides=(4, 2), out_indices=(0, 1), window_size=4,
                   in_channels=channels, moe=dict(MOE, layers=((), (0, ))))


def vit(channels):
    return ViTMoE(embed_dims=24, num_layers=2, num_heads=2, mlp_dims=48,
                  img_size=32, patch_size=8, in_channels=channels,
                  moe=dict(MOE, layers=(1, )))


def cvt(channels):
    return CvTMoE(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2),
                  patch_sizes=(7, 3), strides=(4, 2), patch_padding=(2, 1),
                  drop_path_rates=(0., 0.), out_indices=(0, 1),
                  in_channels=channels, moe=dict(MOE, layers=((), (0, ))))


def segformer(channels):
    return MODELS.build(dict(
        type='rmoe.UpcycledBackbone', moe=dict(MOE, layers=(1, )),
        backbone=dict(type='mmseg.MixVisionTransformer', embed_dims=8,
                      num_stages=2, num_layers=(1, 1), num_heads=(1, 2),
                      patch_sizes=(7, 3), strides=(4, 2), sr_ratios=(2, 1),
                      out_indices=(0, 1), in_channels=channels)))


BACKBONES = {
    'Swin': (swin, PROJECTION), 'ViT': (vit, PROJECTION),
    'CvT': (cvt, f'stages.0.{PROJECTION}'),
    'SegFormer': (segformer, 'layers.0.0.projection.weight')}
every_backbone = pytest.mark.parametrize('build, key', BACKBONES.values(),
                                         ids=BACKBONES)


def randomise(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=.2)
    return model.eval()


@every_backbone
@pytest.mark.parametrize('channels', [1, 2, 4, 6, 13])
def test_weights_are_those_of_timm(build, key, channels):
    state = randomise(build(3)).state_dict()
    expected = adapt_input_conv(channels, state[key])
    model = build(channels)
    fitted, report = fit(model, state)
    torch.testing.assert_close(fitted[key], expected)
    model.load_state_dict(state)
    torch.testing.assert_close(model.state_dict()[key], expected)
    assert report.status[key] == 'adapted'
    assert [name for name, status in report.status.items()
            if status == 'adapted'] == [key]
    how = ('summed over them' if channels == 1 else
           f'repeated and scaled by 3/{channels}')
    assert report.table().endswith(
        f'\n  {key}: 3 image channels in the checkpoint, {channels} in the '
        f'model: {how}')


@every_backbone
@pytest.mark.parametrize('channels', [1, 6])
def test_what_the_model_sees_stays(build, key, channels):
    source, model = randomise(build(3)), build(channels).eval()
    model.load_state_dict(source.state_dict())
    image = torch.randn(2, min(channels, 3), 32, 32)
    # A grey image as three equal channels; and a colour image twice.
    given = image.repeat(1, channels // image.shape[1], 1, 1)
    colour = image.repeat(1, 3 // image.shape[1], 1, 1)
    for ours, theirs in zip(model(given), source(colour), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_file_of_another_library_in_half_precision():
    theirs = timm.create_model('vit_tiny_patch16_224', depth=1, embed_dim=24,
                               num_heads=2, img_size=32, num_classes=3)
    weight = torch.randn(24, 3, 16, 16)
    state = dict(theirs.state_dict(), **{'patch_embed.proj.weight': weight})
    model = ViTMoE(embed_dims=24, num_layers=1, num_heads=2, mlp_dims=96,
                   img_size=32, patch_size=16, in_channels=4)
    fitted, _ = fit(model, {name: value.half()
                            for name, value in state.items()})
    assert fitted[PROJECTION].dtype == torch.float32
    assert torch.equal(fitted[PROJECTION][:, 3],
                       .75 * weight.half().float()[:, 0])


def test_a_load_says_so(monkeypatch):
    logged = []
    monkeypatch.setattr(MMLogger, 'callHandlers',
                        lambda _, record: logged.append(record.getMessage()))
    MMLogger.get_instance('channels', logger_name='channels')
    vit(1).load_state_dict(vit(3).state_dict())
    assert f'{PROJECTION}: 3 image channels in the checkpoint, 1' in logged[-1]
    vit(3).load_state_dict(vit(3).state_dict())
    assert 'image channels' not in logged[-1]


@every_backbone
@pytest.mark.parametrize('theirs, ours', [(4, 3), (1, 3), (4, 6), (6, 1)])
def test_other_files_are_refused(build, key, theirs, ours):
    with pytest.raises(ValueError, match=(
            rf'^{key}: {theirs} image channels in the checkpoint and {ours} '
            rf'in the model.*Set in_channels={theirs}')):
        build(ours).load_state_dict(build(theirs).state_dict())


def test_another_patch_size_stays_an_error():
    state = dict(vit(3).state_dict(),
                 **{PROJECTION: torch.zeros(24, 3, 16, 16)})
    with pytest.raises(ValueError, match=r'\(24, 3, 16, 16\) in the check'):
        fit(vit(4), state)


def test_double_precision_stays():
    weight = torch.rand(2, 3, 1, 1, dtype=torch.float64)
    assert torch.equal(adapt_channels(weight, 1)[0],
                       weight.sum(1, keepdim=True))
