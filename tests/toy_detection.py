"""A detector of a few thousand parameters on the images of coco.py."""
from pathlib import Path

from coco import CLASSES, coco_dataset
from mmengine.config import Config

DETECTOR = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[127.] * 3, std=[64.] * 3,
        pad_size_divisor=32),
    backbone=dict(
        type='rmoe.SwinMoE', embed_dims=8, depths=(1, 1, 2),
        num_heads=(1, 1, 2), strides=(4, 2, 2), out_indices=(1, 2),
        window_size=4, drop_path_rate=0.,
        moe=dict(layers=((), (), (0, 1)), num_experts=4,
                 router=dict(type='TokenChoiceRouter', noise_std=0.))),
    neck=dict(type='FPN', in_channels=[16, 32], out_channels=8, num_outs=3),
    bbox_head=dict(
        type='RetinaHead', num_classes=len(CLASSES), in_channels=8,
        stacked_convs=1, feat_channels=8,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
            ratios=[1.0], strides=[8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss'), loss_bbox=dict(type='L1Loss')),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=.5, neg_iou_thr=.4,
                      min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1),
    test_cfg=dict(nms_pre=10, min_bbox_size=0, score_thr=0.,
                  nms=dict(type='nms', iou_threshold=.5), max_per_img=5))
LOAD = [dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(64, 64), keep_ratio=True)]
PACK = dict(type='PackDetInputs', meta_keys=(
    'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
    'flip_direction'))


def detection_config(root: Path) -> Config:
    """Two iterations and an evaluation on four images of ``make_coco``."""
    def loader(pipeline, **options):
        return dict(
            batch_size=2, num_workers=0,
            dataset=coco_dataset(root, pipeline=pipeline, **options),
            sampler=dict(type='DefaultSampler', shuffle=False))

    test = loader([*LOAD, PACK], test_mode=True)
    evaluator = dict(type='CocoMetric', ann_file=str(root / 'train.json'),
                     metric='bbox')
    return Config(dict(
        default_scope='mmdet', model=DETECTOR,
        train_dataloader=loader([*LOAD, dict(PACK, meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape',
            'scale_factor'))]),
        val_dataloader=test, test_dataloader=test, val_evaluator=evaluator,
        test_evaluator=evaluator, val_cfg=dict(type='ValLoop'),
        test_cfg=dict(type='TestLoop'),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(
            type='AdamW', lr=1e-3)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='rmoe.CheckpointHook', interval=1),
            visualization=dict(type='DetVisualizationHook')),
        custom_hooks=[dict(type='rmoe.MoELossHook')],
        vis_backends=[dict(type='LocalVisBackend')],
        visualizer=dict(type='DetLocalVisualizer', name='visualizer',
                        vis_backends=[dict(type='LocalVisBackend')]),
        tta_model=dict(type='DetTTAModel', tta_cfg=dict(
            nms=dict(type='nms', iou_threshold=.5), max_per_img=5)),
        tta_pipeline=[
            LOAD[0], dict(type='TestTimeAug', transforms=[
                [LOAD[2]],
                [dict(type='RandomFlip', prob=1.),
                 dict(type='RandomFlip', prob=0.)],
                [LOAD[1]], [PACK]])],
        randomness=dict(seed=0)))
