_base_ = [
    '../_base_/models/mask-rcnn_swin_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/det_runtime.py',
    '../_base_/schedules/coco_3x.py'
]
checkpoint_file = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)))
