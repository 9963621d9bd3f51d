# Swin with half the width of Swin-T, which trains on two CPU cores.
_base_ = [
    '../_base_/models/upernet_swin.py', '../_base_/datasets/camvid.py',
    '../_base_/default_runtime.py', '../_base_/schedules/camvid_1k.py'
]
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(embed_dims=48, drop_path_rate=0.1),
    decode_head=dict(
        in_channels=[48, 96, 192, 384], channels=64, num_classes=11,
        norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=192, channels=64, num_classes=11, norm_cfg=norm_cfg))
default_hooks = dict(
    checkpoint=dict(interval=500, max_keep_ckpts=2, save_best=None))
