"""Padding an image changes nothing for its own tokens: neither their experts,
nor the counts, nor the auxiliary losses."""
import copy
import warnings

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from padding_ranks import count_padded
from routers import ROUTERS
from torch import nn
from two_ranks import run_two_ranks

from rmoe.backbones.padding import (
    ValidArea,
    image_sizes,
    install_padding,
    valid_area,
)
from rmoe.moe import collect_losses, moe_layers
from rmoe.registry import MODELS

# In these backbones nothing but routing can make padding change the tokens of
# the image: apart from it, each token is computed alone, or within a window
# that contains no padding.
SWIN = dict(type='rmoe.SwinMoE', embed_dims=8, depths=(1, 1), num_heads=(1, 1),
            strides=(4, 2), out_indices=(0, 1), window_size=4,
            drop_path_rate=0., moe=dict(layers=((0, ), (0, ))))
VIT = dict(type='rmoe.ViTMoE', embed_dims=8, num_layers=2, num_heads=1,
           mlp_dims=16, patch_size=8, img_size=64, out_indices=(1, ),
           moe=dict(layers=(0, 1)))
CVT = dict(type='rmoe.CvTMoE', embed_dims=(8, ), depths=(2, ),
           num_heads=(1, ), patch_sizes=(7, ), strides=(4, ),
           patch_padding=(2, ), drop_path_rates=(0., ), out_indices=(0, ),
           moe=dict(layers=((0, 1), )))
FOREIGN = dict(
    type='rmoe.UpcycledBackbone', moe=dict(layers=(0, 1)),
    backbone=dict(type='mmseg.VisionTransformer', embed_dims=8, num_layers=2,
                  num_heads=1, patch_size=8, img_size=(64, 64)))
BACKBONES = dict(swin=SWIN, vit=VIT, cvt=CVT, foreign=FOREIGN)


class Owner(BaseModel):
    """A model that calls its backbone like a detector."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.backbone(inputs)


def owner(name, router=None, **moe):
    config = copy.deepcopy(BACKBONES[name])
    config['moe'].update(num_experts=4, router=router, **moe)
    torch.manual_seed(0)
    backbone = MODELS.build(config)
    backbone.init_weights()
    for key, module in backbone.named_modules():
        if key.endswith(('out_proj', 'attn.proj')) and name != 'swin':
            nn.init.zeros_(module.weight)
        if key.endswith('experts'):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=.5)
    if name != 'swin':  # padding would move to another row of the table
        nn.init.zeros_(getattr(backbone, 'pos_embed', torch.empty(0)))
    return Owner(backbone)


def samples(*shapes):
    return [DetDataSample(metainfo=dict(img_shape=shape))
            for shape in shapes]


def measure(model, images, data_samples):
    """Features, counts and auxiliary losses of one pass."""
    layers = moe_layers(model)
    for layer in layers.values():
        for buffer in (layer.demand_E, layer.kept_E, layer.token_counts):
            buffer.zero_()
    collect_losses(model, start=True)
    maps = model(images, data_samples)
    losses = collect_losses(model, start=False)
    counts = torch.stack([torch.cat([layer.demand_E, layer.kept_E,
                                     layer.token_counts])
                          for layer in layers.values()])
    return maps, counts, losses


def padded_pair(seed=0, value=3.):
    """An image, and the same image with padding."""
    image = torch.randn(1, 3, 64, 32, generator=torch.Generator().manual_seed(
        seed))
    padded = torch.full((1, 3, 96, 64), value)
    padded[..., :64, :32] = image
    return image, padded


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('router', ROUTERS)
@pytest.mark.parametrize('name', ['swin', 'vit', 'cvt', 'foreign'])
def test_padding_steers_nothing(name, router, training):
    config = dict(ROUTERS[router])
    if config['type'] not in ('BiasBalancedRouter', 'SparseExpertChoiceRouter'):
        config['noise_std'] = 0.
    model = owner(name, config).train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    # CvT's first convolution overlaps, and pads with zeros itself.
    image, padded = padded_pair(value=0. if name == 'cvt' else 3.)
    alone, counts, losses = measure(model, image, samples((64, 32)))
    maps, counts_padded, losses_padded = measure(model, padded,
                                                 samples((64, 32)))
    # soft loads are sums in float32
    torch.testing.assert_close(counts_padded, counts, rtol=1e-6, atol=1e-5)
    assert (counts.sum() > 0) == training
    for key, loss in losses.items():
        torch.testing.assert_close(losses_padded[key], loss)
    for wide, narrow in zip(maps, alone):
        torch.testing.assert_close(
            wide[..., :narrow.shape[2], :narrow.shape[3]], narrow,
            atol=2e-5, rtol=1e-5)
    # Without the sizes padding does change the counts; otherwise this test
    # could not fail.
    _, blind, _ = measure(model, padded, None)
    assert not training or not torch.equal(blind, counts)


def test_a_batch_of_two_sizes_counts_as_its_images_do():
    model = owner('swin', dict(type='TokenChoiceRouter', noise_std=0.)).train()
    one, wide = padded_pair(0)
    two = torch.randn(1, 3, 96, 64)
    _, first, _ = measure(model, one, samples((64, 32)))
    _, second, _ = measure(model, two, samples((96, 64)))
    _, both, _ = measure(model, torch.cat([wide, two]),
                         samples((64, 32), (96, 64)))
    torch.testing.assert_close(both, first + second)


def test_tokens_with_a_pixel_of_the_image_are_valid():
    area = ValidArea(torch.tensor([[5, 16], [8, 9]]), (8, 16))
    mask = area.tokens((2, 4), 4, torch.device('cpu'), leading=1)
    # 4 x 4 pixels a token: 5 rows reach into the second row of tokens, 9
    # columns into the third column
    assert mask.tolist() == [[True] * 9,
                             [True, True, True, True, False,
                              True, True, True, False]]
    mask = area.tokens((4, 8), 2, torch.device('cpu'))
    assert mask[0].view(4, 8).tolist() == [[True] * 8] * 3 + [[False] * 8]
    # The last token extends beyond the edge: 93 pixels make 24 tokens of 4
    # pixels, while the image's 86 pixels make 22.
    area = ValidArea(torch.tensor([[40, 86]]), (40, 93))
    assert area.tokens((10, 24), 4, torch.device('cpu')).sum() == 10 * 22


@pytest.mark.parametrize('name', ['swin', 'vit', 'foreign'])
def test_sides_that_are_no_multiple_of_the_stride(name):
    model = owner(name).train()
    _, alone, _ = measure(model, torch.randn(1, 3, 40, 86), samples((40, 86)))
    _, padded, _ = measure(model, torch.randn(1, 3, 40, 93),
                           samples((40, 86)))
    assert torch.equal(padded[:, -2], alone[:, -2])


def test_no_padding_no_area():
    sizes = image_sizes(torch.zeros(2, 3, 8, 8), samples((8, 8), (8, 9)))
    assert sizes == ((8, 8), (8, 9))
    assert valid_area(torch.zeros(2, 3, 8, 8), sizes) is None


@pytest.mark.parametrize('images, known', [
    (torch.zeros(1, 3, 8, 8), [DetDataSample()]),  # sizes unknown
    (torch.zeros(1, 3, 8, 8), None),
    (torch.zeros(2, 3, 8, 8), samples((4, 4))),  # about another batch
    (torch.zeros(2, 3, 8, 8), torch.zeros(2)),  # labels, not samples
])
def test_sizes_that_are_not_known(images, known):
    assert image_sizes(images, known) == ()


@pytest.mark.parametrize('name', ['vit', 'foreign'])
def test_windows_of_sliding_inference_are_not_masked(name, recwarn):
    model = owner(name).eval()
    seen = []
    layer = next(iter(moe_layers(model).values()))
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get('valid')),
        with_kwargs=True)
    model.forward = lambda inputs, data_samples: [
        model.backbone(inputs[..., :64]), model.backbone(inputs)]
    model(torch.randn(1, 3, 64, 128), samples((64, 100)))
    assert seen[0] is None
    assert seen[1].sum() == 1 + 8 * 13
    assert not [w for w in recwarn if 'are no map' in str(w.message)]


def test_the_area_is_forgotten_even_after_an_error():
    model = owner('swin')
    model(torch.zeros(1, 3, 32, 32), samples((16, 16)))
    assert model.backbone.known_batches == ()
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5, 32, 32), samples((16, 16)))
    assert model.backbone.known_batches == ()


def test_copies_of_a_model_tell_their_own_backbone():
    model = owner('foreign')
    twin = copy.deepcopy(model).train()
    _, padded = padded_pair()
    _, counts, _ = measure(twin, padded, samples((64, 32)))
    assert counts[0, -2] == 8 * 4 + 1
    assert not any(layer.token_counts.any()
                   for layer in moe_layers(model).values())


def test_a_foreign_grid_that_fits_no_stride_is_reported():
    config = copy.deepcopy(FOREIGN)
    config['backbone']['patch_size'] = 10
    model = Owner(MODELS.build(config))
    with pytest.warns(UserWarning, match='are no map of stride'):
        model(torch.randn(1, 3, 60, 60), samples((30, 60)))


def small_detector() -> Config:
    return Config(dict(
        type='mmdet.FCOS', backbone=SWIN, neck=dict(
            type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2),
        data_preprocessor=dict(type='mmdet.DetDataPreprocessor',
                               pad_size_divisor=32),
        bbox_head=dict(type='FCOSHead', num_classes=2, in_channels=8,
                       feat_channels=32, stacked_convs=1, strides=[4, 8],
                       regress_ranges=((-1, 64), (64, 1e8))),
        test_cfg=dict(nms_pre=10, min_bbox_size=0, score_thr=0.,
                      nms=dict(type='nms', iou_threshold=.5),
                      max_per_img=5)))


def test_a_detector_and_a_segmentor_tell_the_sizes_themselves():
    """Both are called through their own preprocessors, which pad."""
    counted = {}
    image = torch.randint(256, (3, 64, 36), dtype=torch.uint8)
    detector = small_detector()
    segmentor = Config(dict(
        type='mmseg.EncoderDecoder', backbone=SWIN,
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor',
                               size=(64, 64)),
        decode_head=dict(type='FCNHead', in_channels=16, in_index=1,
                         channels=8, num_classes=2, num_convs=1)))
    for scope, cfg, sample in (
            ('mmdet', detector, DetDataSample(
                metainfo=dict(img_shape=(64, 36), ori_shape=(64, 36),
                              scale_factor=(1., 1.)))),
            ('mmseg', segmentor, SegDataSample(
                metainfo=dict(img_shape=(64, 36)), gt_sem_seg=PixelData(
                    data=torch.zeros(1, 64, 36).long())))):
        with DefaultScope.overwrite_default_scope(scope):
            model = MODELS.build(cfg)
            model.eval()
            for layer in moe_layers(model).values():
                layer.train()
            data = model.data_preprocessor(
                dict(inputs=[image], data_samples=[sample]), scope == 'mmseg')
            assert data['inputs'].shape[2:] == (64, 64)
            mode = dict(mmdet='predict', mmseg='loss')[scope]
            model(**data, mode=mode)
        counted[scope] = [float(layer.token_counts[0])
                          for layer in moe_layers(model).values()]
    # 36 columns are 9 of stride 4, and reach into a fifth of stride 8
    assert counted['mmdet'] == counted['mmseg'] == [16 * 9, 8 * 5]


class Encoder(nn.Module):
    """A wrapper that knows nothing of data samples."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)


class Elsewhere(BaseModel):
    """A model whose backbone has another name, with something around it."""

    def __init__(self, backbone, around=nn.Sequential):
        super().__init__()
        self.image_encoder = around(backbone)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.image_encoder(inputs)


def nothing(module):
    return module


def compiled(module):
    return torch.compile(module, backend='eager')


@pytest.mark.parametrize('name', ['swin', 'foreign'])
@pytest.mark.parametrize('around', [
    nothing, nn.Sequential, Encoder,
    pytest.param(compiled, marks=pytest.mark.torch('2.6'))],
    ids=lambda around: around.__name__)
def test_a_backbone_elsewhere_is_told(name, around):
    backbone = owner(
        name, dict(type='TokenChoiceRouter', noise_std=0.)).backbone
    model = Elsewhere(backbone, around)
    _, padded = padded_pair()
    _, blind, _ = measure(model.train(), padded, samples((64, 32)))
    install_padding(model), install_padding(model)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        _, counts, _ = measure(each, padded, samples((64, 32)))
        assert not torch.equal(counts, blind)
        classes = 1 if name == 'foreign' else 0
        assert counts[0, -2] == 64 * 32 / (8 if classes else 4)**2 + classes
        # After the forward pass the sizes are forgotten.
        _, counts, _ = measure(each, padded, None)
        assert torch.equal(counts, blind)
    assert backbone.known_batches == ()


def test_what_is_called_inside_may_know_another_batch():
    """A detector inside a model that is called with its own images."""
    inner = owner('swin', dict(type='TokenChoiceRouter', noise_std=0.))
    whole, padded = torch.randn(1, 3, 96, 64), padded_pair()[1]
    _, expected, _ = measure(inner, padded, samples((64, 32)))

    class Outer(BaseModel):

        def forward(self, inputs, data_samples=None):
            self.inner(padded, samples((64, 32)))
            seen.append(self.inner.backbone.known_batches)

    seen, outer = [], Outer()
    outer.inner = inner
    install_padding(outer)
    _, counts, _ = measure(outer, whole, samples((96, 64)))
    assert torch.equal(counts, expected)
    (known, ), = seen
    assert known.images is whole and known.area is None


def test_padding_that_gets_lost_is_told():
    model = owner('swin').train()
    model.forward = lambda inputs, data_samples: model.backbone(
        torch.cat([inputs, inputs]))
    padded = padded_pair()[1]
    with pytest.warns(UserWarning, match='SwinMoE got images of another '
                      'shape than the padded ones'):
        model(padded, samples((64, 32)))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*images of another shape')
        model(padded, samples((96, 64)))
        model.eval()(padded, samples((64, 32)))


def test_branches_of_a_semi_supervised_detector():
    """The detectors inside are called by ``loss``, so their own forward hooks
    do not run. Branches of the same shape are distinguished."""
    detector = dict(small_detector(), data_preprocessor=dict(
        type='mmdet.DetDataPreprocessor', pad_size_divisor=32))
    config = Config(dict(
        type='mmdet.SemiBaseDetector', detector=detector,
        semi_train_cfg=dict(freeze_teacher=True, cls_pseudo_thr=0.),
        semi_test_cfg=dict(predict_on='teacher'),
        data_preprocessor=dict(
            type='mmdet.MultiBranchDataPreprocessor',
            data_preprocessor=detector['data_preprocessor'])))
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config).train()
    install_padding(model)
    sizes = dict(sup=(64, 36), unsup_teacher=(40, 64), unsup_student=(64, 52))
    data = model.data_preprocessor(dict(
        inputs={branch: [torch.randint(256, (3, *size), dtype=torch.uint8)]
                for branch, size in sizes.items()},
        data_samples={branch: [DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1, 1),
                          homography_matrix=np.eye(3, dtype=np.float32)),
            gt_instances=InstanceData(
                bboxes=torch.tensor([[2., 2., 18., 18.]]),
                labels=torch.tensor([0])))]
            for branch, size in sizes.items()}), True)
    assert {x.shape for x in data['inputs'].values()} == {(1, 3, 64, 64)}
    seen = []
    for part in (model.student, model.teacher):
        next(iter(moe_layers(part).values())).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(int(kwargs['valid'].sum())),
            with_kwargs=True)
    assert 'sup_loss_cls' in model(**data, mode='loss')
    # tokens of 4 pixels: the student's labelled image, what the teacher
    # labels, and what the student then learns from it
    assert seen == [16 * 9, 10 * 16, 16 * 13]


def test_two_ranks_tell_their_own_backbones(tmp_path):
    counts = run_two_ranks(count_padded, str(tmp_path), SWIN)
    # rank 1 has the smaller image, in a batch of the same shape
    assert counts == [8 * 8, 8 * 3]
