"""The pyramid of a plain ViT against plain torch operations."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rmoe.backbones import ViTMoE
from rmoe.registry import MODELS


def build(**options):
    neck = MODELS.build(dict(type='rmoe.SimpleFeaturePyramid', in_channels=16,
                             out_channels=6, **options))
    for parameter in neck.parameters():
        nn.init.normal_(parameter, std=.3)
    return neck


def norm(x, weight, bias):
    """Over the channels of each pixel."""
    mean = x.mean(1, keepdim=True)
    var = x.var(1, keepdim=True, unbiased=False)
    return ((x - mean) / (var + 1e-5).sqrt() * weight[:, None, None] +
            bias[:, None, None])


def level(x, scale, weights):
    """ViTDet's level of one scale, with the weights in their order."""
    take = iter(weights)
    if scale == 4:
        x = F.conv_transpose2d(x, next(take), next(take), stride=2)
        x = F.gelu(norm(x, next(take), next(take)))
    if scale >= 2:
        x = F.conv_transpose2d(x, next(take), next(take), stride=2)
    if scale == .5:
        x = F.max_pool2d(x, 2)
    x = norm(F.conv2d(x, next(take)), next(take), next(take))
    x = norm(F.conv2d(x, next(take), padding=1), next(take), next(take))
    assert next(take, None) is None
    return x


@pytest.mark.usefixtures('host_scope')
@pytest.mark.parametrize('scales, options, sizes', [
    ((4, 2, 1, .5), {}, [(24, 20), (12, 10), (6, 5), (3, 2)]),
    ((4, 2, 1, .5), dict(num_outs=6),
     [(24, 20), (12, 10), (6, 5), (3, 2), (2, 1), (1, 1)]),
    ((1, ), dict(num_outs=3), [(6, 5), (3, 3), (2, 2)]),
    ((.5, 2), {}, [(3, 2), (12, 10)]),
])
def test_sizes(scales, options, sizes):
    # only the last of the backbone's maps counts
    maps = (torch.randn(2, 9, 4, 4), torch.randn(2, 16, 6, 5))
    outs = build(scales=scales, **options)(maps)
    assert isinstance(outs, tuple)
    assert [out.shape for out in outs] == [(2, 6, *size) for size in sizes]


@pytest.mark.parametrize('scale', [4, 2, 1, .5])
@torch.no_grad()
def test_a_level_equals_plain_operations(scale):
    neck = build(scales=(scale, ))
    x = torch.randn(2, 16, 6, 5)
    expected = level(x, scale, neck.parameters())
    out, = neck([x])
    assert (out - expected).abs().max() < 1e-5


@torch.no_grad()
def test_more_levels_take_every_second_pixel():
    outs = build(num_outs=6)([torch.randn(2, 16, 12, 10)])
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])
    assert torch.equal(outs[5], outs[3][:, :, ::4, ::4])


def test_defaults_are_those_of_vitdet():
    neck = MODELS.build(dict(type='rmoe.SimpleFeaturePyramid', in_channels=8))
    assert [out.shape for out in neck([torch.randn(1, 8, 4, 4)])] == [
        (1, 256, size, size) for size in (16, 8, 4, 2)]


def test_every_parameter_learns_behind_a_vit():
    vit = ViTMoE(embed_dims=16, num_layers=2, num_heads=2, mlp_dims=32,
                 img_size=32, patch_size=16, out_indices=(1, ))
    neck = build()
    outs = neck(vit(torch.randn(1, 3, 64, 96)))
    # strides 4, 8, 16 and 32
    assert [tuple(out.shape[2:]) for out in outs] == [
        (16, 24), (8, 12), (4, 6), (2, 3)]
    sum(out.square().sum() for out in outs).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad.any(), name


@pytest.mark.parametrize('options, message', [
    (dict(scales=(4, 3)), r'scale 3 is not one of \(4, 2, 1, 0\.5\)'),
    (dict(scales=(.25, )), r'scale 0\.25 is not one of'),
    (dict(num_outs=3), 'num_outs=3 is less than the 4 scales'),
    (dict(scales=(1, ), num_outs=0), 'num_outs=0 is less than the 1 scales'),
])
def test_errors_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
