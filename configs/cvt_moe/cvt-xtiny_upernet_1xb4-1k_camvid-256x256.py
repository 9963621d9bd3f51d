# Starts from the upstream run of the same backbone; see configs/pipelines.
_base_ = [
    '../_base_/models/upernet_cvt.py', '../_base_/datasets/camvid.py',
    '../_base_/default_runtime.py', '../_base_/schedules/camvid_1k.py'
]
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(
        arch=None, embed_dims=(32, 96, 192), depths=(1, 2, 6),
        act_cfg=dict(type='GELU'), bn_cfg=norm_cfg),
    decode_head=dict(
        in_channels=[32, 96, 192], channels=64, num_classes=11,
        norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=192, channels=64, num_classes=11, norm_cfg=norm_cfg))
default_hooks = dict(
    checkpoint=dict(interval=500, max_keep_ckpts=2, save_best=None))
load_from = 'work_dirs/cvt-xtiny_1xb64-7e_tiny-imagenet-100-64x64/epoch_7.pth'
