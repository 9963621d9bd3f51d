# The dense twin of the 15B model of V-MoE, with 48 blocks and FFNs of width
# 6400.
_base_ = [
    '../_base_/models/upernet_vit.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k_vit.py'
]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        arch='vmoe-15b',
        patch_size=14,
        act_cfg=dict(type='GELU', approximate='tanh'),
        out_indices=(11, 23, 35, 47),
        with_cp=True),
    neck=dict(in_channels=[1408, 1408, 1408, 1408], out_channels=1408),
    decode_head=dict(in_channels=[1408, 1408, 1408, 1408]),
    auxiliary_head=dict(in_channels=1408))
