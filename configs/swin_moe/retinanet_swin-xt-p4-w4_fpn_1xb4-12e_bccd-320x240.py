# Starts from the upstream run of the same backbone; see configs/pipelines.
_base_ = [
    '../_base_/models/retinanet_swin_fpn.py', '../_base_/datasets/bccd.py',
    '../_base_/det_runtime.py', '../_base_/schedules/bccd_12e.py'
]
# Half the width of Swin-T, a narrow head, and smaller anchors for platelets.
model = dict(
    backbone=dict(embed_dims=48, window_size=4, drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384], out_channels=64),
    bbox_head=dict(
        num_classes=3, in_channels=64, feat_channels=64, stacked_convs=2,
        anchor_generator=dict(octave_base_scale=3)))
default_hooks = dict(
    checkpoint=dict(interval=6, save_best=None),
    logger=dict(interval=17))
load_from = 'work_dirs/swin-xtiny-patch4-window4_1xb64-7e_tiny-imagenet-100-64x64/epoch_7.pth'
