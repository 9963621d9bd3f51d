"""Small COCO data sets, drawn, and a small detector for them."""
import json

import numpy as np
from mmengine.config import Config
from PIL import Image

CLASSES = ('disk', 'square')


def annotation(number, image, category, box, **more):
    x, y, w, h = box
    return dict(id=number, image_id=image, category_id=category,
                bbox=[x, y, w, h], area=w * h, iscrowd=0,
                segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]) | more


def make_coco(root, images=4, size=(64, 48), name='train.json'):
    """Write noisy images with one box of each class; the content of the
    annotation file, to be changed and written again."""
    rng = np.random.default_rng(0)
    (root / 'images').mkdir(parents=True, exist_ok=True)
    content = dict(images=[], annotations=[], categories=[
        dict(id=3, name='disk'), dict(id=7, name='square')])
    for i in range(images):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(root / f'images/{i}.jpg')
        content['images'].append(dict(
            id=i, file_name=f'{i}.jpg', width=size[0], height=size[1]))
        content['annotations'] += [
            annotation(2 * i, i, 3, (4, 4, 20, 20)),
            annotation(2 * i + 1, i, 7, (30, 10, 30, 30))]
    write(root, content, name)
    return content


def write(root, content, name='train.json'):
    (root / name).write_text(json.dumps(content))


def coco_dataset(root, **more):
    return dict(
        type='CocoDataset', data_root=str(root), ann_file='train.json',
        data_prefix=dict(img='images'), metainfo=dict(classes=CLASSES),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[dict(type='LoadImageFromFile'),
                  dict(type='LoadAnnotations', with_bbox=True),
                  dict(type='PackDetInputs')]) | more


def coco_config(root, model=None, **more):
    """Enough of a detector's config to check its data."""
    return Config(dict(
        default_scope='mmdet', model=model or {},
        train_dataloader=dict(dataset=coco_dataset(root, **more))))


DETECTOR = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=dict(
        type='rmoe.SwinMoE', embed_dims=8, depths=(1, 1, 2),
        num_heads=(1, 1, 2), strides=(4, 2, 2), out_indices=(1, 2),
        moe=dict(layers=((), (), (0, 1)), num_experts=4)),
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
    test_cfg=dict(nms_pre=10, min_bbox_size=0, score_thr=.0,
                  nms=dict(type='nms', iou_threshold=.5), max_per_img=5))


def detector_config(root) -> Config:
    """A whole config that trains the detector for three epochs."""
    val = coco_dataset(root, test_mode=True)
    return Config(dict(
        default_scope='mmdet', model=DETECTOR,
        train_dataloader=dict(
            batch_size=2, num_workers=0, dataset=coco_dataset(root),
            sampler=dict(type='DefaultSampler', shuffle=True)),
        val_dataloader=dict(
            batch_size=1, num_workers=0, dataset=val,
            sampler=dict(type='DefaultSampler', shuffle=False)),
        val_evaluator=dict(type='CocoMetric', metric='bbox',
                           ann_file=str(root / 'train.json')),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=3),
        val_cfg=dict(type='ValLoop'),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)),
        custom_hooks=[dict(type='rmoe.MoELossHook')]))
