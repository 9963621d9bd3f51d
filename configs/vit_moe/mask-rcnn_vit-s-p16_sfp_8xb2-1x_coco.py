_base_ = [
    '../_base_/models/mask-rcnn_vit_sfp.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/det_runtime.py',
    '../_base_/schedules/coco_1x.py'
]
checkpoint_file = 'https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth'
model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)))
# The weight decay and the layer-wise decay of the learning rate are ViTDet's.
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(
        layer_decay_rate=0.7,
        norm_decay_mult=0.,
        bias_decay_mult=0.,
        custom_keys=dict(
            pos_embed=dict(decay_mult=0.), cls_token=dict(decay_mult=0.))))
