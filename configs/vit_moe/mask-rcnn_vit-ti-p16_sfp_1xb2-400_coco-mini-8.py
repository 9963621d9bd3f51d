# Overfits eight images on two CPU cores, which shows that a detector learns.
_base_ = [
    '../_base_/models/mask-rcnn_vit_sfp.py',
    '../_base_/datasets/coco_mini_8.py', '../_base_/det_runtime.py',
    '../_base_/schedules/coco_mini_400.py'
]
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='data/vit_tiny/vit_tiny_patch16_224_augreg_'
            'tinyimagenet200.safetensors')),
    # The heads have a quarter of the usual width, and there are fewer
    # proposals.
    neck=dict(in_channels=192, out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=64)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)))
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=400, save_best=None))
