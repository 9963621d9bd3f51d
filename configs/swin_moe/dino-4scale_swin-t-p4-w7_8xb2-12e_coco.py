_base_ = [
    '../_base_/models/dino-4scale_swin.py',
    '../_base_/datasets/coco_detection_ms-crop.py',
    '../_base_/det_runtime.py',
    '../_base_/schedules/coco_1x.py'
]
checkpoint_file = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)))
# As in DINO, images without objects are also used for training.
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.0001),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(
        custom_keys=dict(_delete_=True, backbone=dict(lr_mult=0.1))))
param_scheduler = [
    dict(
        type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[11],
        gamma=0.1)
]
