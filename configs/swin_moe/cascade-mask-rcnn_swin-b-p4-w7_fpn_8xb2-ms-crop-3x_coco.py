_base_ = [
    '../_base_/models/cascade-mask-rcnn_swin_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/det_runtime.py',
    '../_base_/schedules/coco_3x.py'
]
checkpoint_file = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth'
model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    neck=dict(in_channels=[128, 256, 512, 1024]))
