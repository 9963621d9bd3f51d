_base_ = [
    '../_base_/models/retinanet_swin_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/det_runtime.py',
    '../_base_/schedules/coco_1x.py'
]
checkpoint_file = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)))
