"""Experts in the FFNs of decode heads, by UpcycledBackbone around the head."""
import copy

import pytest
import torch
import visualize_routing
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from rmoe.backbones.padding import install_padding
from rmoe.engine.roles import parameters_by_role
from rmoe.moe import collect_losses, moe_layers
from rmoe.registry import MODELS
from rmoe.visualization import segmentor as figure

SEGMENTER = dict(
    type='mmseg.SegmenterMaskTransformerHead', in_channels=32, channels=32,
    num_classes=3, num_layers=2, num_heads=2, embed_dims=32,
    drop_path_rate=0., dropout_ratio=0., align_corners=False,
    loss_decode=dict(type='mmseg.CrossEntropyLoss'))
ATTENTION = dict(embed_dims=16, num_heads=2, dropout=0., batch_first=True)
FFN = dict(embed_dims=16, feedforward_channels=32, num_fcs=2, ffn_drop=0.,
           act_cfg=dict(type='ReLU'))
ENCODING = dict(num_feats=8, normalize=True)
MASK2FORMER = dict(
    type='mmseg.Mask2FormerHead', in_channels=[32] * 4, strides=[4, 8, 16, 32],
    feat_channels=16, out_channels=16, num_classes=3, num_queries=5,
    num_transformer_feat_level=3, align_corners=False,
    pixel_decoder=dict(
        type='mmdet.MSDeformAttnPixelDecoder', num_outs=3,
        norm_cfg=dict(type='GN', num_groups=4), act_cfg=dict(type='ReLU'),
        encoder=dict(num_layers=1, layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=16, num_heads=2, num_levels=3,
                               num_points=2, dropout=0., batch_first=True),
            ffn_cfg=FFN)),
        positional_encoding=ENCODING),
    positional_encoding=ENCODING,
    transformer_decoder=dict(return_intermediate=True, num_layers=2, layer_cfg=(
        dict(self_attn_cfg=ATTENTION, cross_attn_cfg=ATTENTION, ffn_cfg=FFN))),
    loss_cls=dict(type='mmdet.CrossEntropyLoss', reduction='mean',
                  class_weight=[1., 1., 1., .1]),
    loss_mask=dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True,
                   reduction='mean'),
    loss_dice=dict(type='mmdet.DiceLoss', reduction='mean', naive_dice=True),
    train_cfg=dict(
        num_points=16, oversample_ratio=3., importance_sample_ratio=.75,
        assigner=dict(type='mmdet.HungarianAssigner', match_costs=[
            dict(type='mmdet.ClassificationCost')]),
        sampler=dict(type='mmdet.MaskPseudoSampler')))
# Each head, its FFNs, and the ones that get experts.
HEADS = {
    'Segmenter': (SEGMENTER, ['layers.0.ffn', 'layers.1.ffn']),
    'Mask2Former': (MASK2FORMER, ['pixel_decoder.encoder.layers.0.ffn',
                                  'transformer_decoder.layers.1.ffn'])
}


def segmentor(head, layers=None, moe=None):
    """A small segmentor whose head has experts in ``layers``, or none. ``moe``
    is that of the backbone."""
    single = head is SEGMENTER
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor'),
        backbone=dict(
            type='rmoe.ViTMoE', embed_dims=32, num_layers=2, num_heads=2,
            mlp_dims=64, img_size=64, patch_size=16, moe=moe),
        neck=None if single else dict(
            type='rmoe.SimpleFeaturePyramid', in_channels=32,
            out_channels=32, num_outs=4),
        decode_head=head if layers is None else dict(
            type='rmoe.UpcycledBackbone', backbone=head,
            moe=dict(layers=layers, num_experts=3)),
        train_cfg=dict(), test_cfg=dict(mode='whole')))
    model.init_weights()
    return model


def batch(size=64):
    """As many images as there are feature maps. The last one is padded if
    ``size`` is below 64."""
    torch.manual_seed(1)
    samples = []
    for side in (64, 64, 64, size):
        sample = SegDataSample(metainfo=dict(
            img_shape=(side, side), ori_shape=(side, side),
            batch_input_shape=(64, 64)))
        sample.gt_sem_seg = PixelData(data=torch.randint(3, (1, 64, 64)))
        samples.append(sample)
    return torch.randn(4, 3, 64, 64), samples


@pytest.mark.parametrize('name', HEADS)
def test_a_head_with_experts_begins_as_its_dense_checkpoint(name):
    head, layers = HEADS[name]
    dense, moe = segmentor(head), segmentor(head, layers)
    assert [f'decode_head.{key}' for key in layers] == list(moe_layers(moe))
    for parameter in dense.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=.05)
    moe.load_state_dict(copy.deepcopy(dense.state_dict()))
    images, samples = batch()
    with torch.no_grad():
        expected, got = (model.eval().encode_decode(
            images, [sample.metainfo for sample in samples])
            for model in (dense, moe))
    assert expected.std() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('size', [64, 40])
def test_experts_of_a_head_train(name, size):
    head, layers = HEADS[name]
    model = segmentor(head, layers).train()
    install_padding(model)  # as MoELossHook does
    collect_losses(model, start=True)
    loss, _ = model.parse_losses(model(*batch(size), mode='loss'))
    balance = collect_losses(model, start=False)
    assert balance
    (loss + sum(balance.values())).backward()
    roles = parameters_by_role(model)
    # Two layers, each with the residuals of two linear layers, and a router.
    assert len(roles['residual']) == 8 and len(roles['router']) == 2
    for role in ('residual', 'router'):
        assert all(p.grad.abs().sum() > 0 for p in roles[role])


def test_a_figure_of_the_routing_shows_the_backbone_alone(tmp_path,
                                                          monkeypatch):
    layers = HEADS['Segmenter'][1]
    _, samples = batch()
    item = dict(inputs=torch.zeros(3, 64, 64, dtype=torch.uint8),
                data_samples=samples[0])
    with pytest.raises(ValueError, match='the backbone has no MoE layer'):
        figure.draw_segmentor(segmentor(SEGMENTER, layers).eval(), item,
                              tmp_path / 'routing.png')
    drawn = []
    monkeypatch.setattr(figure, 'draw_routing',
                        lambda image, maps, *_, **__: drawn.extend(maps))
    moe = dict(layers=(1, ), num_experts=2)
    model = segmentor(SEGMENTER, layers, moe).eval()
    figure.draw_segmentor(model, item, tmp_path / 'routing.png')
    assert drawn == ['layer 1']
    loads = visualize_routing.count_loads(model, [item], 1)
    assert list(loads) == ['backbone.layers.1.ffn']
