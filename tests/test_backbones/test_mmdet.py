"""A detector of mmdet with a MoE backbone and auxiliary losses."""
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

from rmoe.engine.moe_loss_hook import install
from rmoe.engine.roles import role_of
from rmoe.registry import MODELS

DETECTOR = dict(
    type='mmdet.RetinaNet',
    data_preprocessor=dict(type='mmdet.DetDataPreprocessor',
                           pad_size_divisor=32),
    backbone=dict(
        type='rmoe.SwinMoE', embed_dims=8, depths=(1, 1, 2),
        num_heads=(1, 1, 2), strides=(4, 2, 2), out_indices=(1, 2),
        moe=dict(layers=((), (), (0, 1)), num_experts=4)),
    neck=dict(type='FPN', in_channels=[16, 32], out_channels=8, num_outs=3),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=8, stacked_convs=1,
        feat_channels=8,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
            ratios=[1.0], strides=[8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss'), loss_bbox=dict(type='L1Loss')),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=.5, neg_iou_thr=.4,
                      min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1),
    test_cfg=dict(nms_pre=10, min_bbox_size=0, score_thr=.0,
                  nms=dict(type='nms', iou_threshold=.5), max_per_img=5))


def test_losses_reach_the_router_and_predictions_come_out():
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config(DETECTOR))
        install(model)
        sample = DetDataSample(gt_instances=InstanceData(
            bboxes=torch.tensor([[4., 4., 40., 44.]]),
            labels=torch.tensor([1])),
            metainfo=dict(img_shape=(64, 60), ori_shape=(64, 60),
                          scale_factor=(1., 1.)))
        image = torch.randint(256, (3, 64, 60), dtype=torch.uint8)
        data = model.data_preprocessor(
            dict(inputs=[image], data_samples=[sample]), True)
        losses = model(**data, mode='loss')
        total, logged = model.parse_losses(losses)
        assert {'loss_moe_importance', 'loss_moe_load', 'loss_cls'} <= set(
            logged)
        total.backward()
        for name, parameter in model.named_parameters():
            if role_of(name) == 'router':
                assert parameter.grad.abs().sum() > 0
        result = model.eval()(**data, mode='predict')[0]
        assert result.pred_instances.bboxes.shape[1] == 4
