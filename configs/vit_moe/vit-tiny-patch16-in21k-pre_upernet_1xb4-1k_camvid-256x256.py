# ViT-Ti with ImageNet-21k weights and a narrow head: trains on CPU cores.
_base_ = [
    '../_base_/models/upernet_vit.py', '../_base_/datasets/camvid.py',
    '../_base_/default_runtime.py', '../_base_/schedules/camvid_1k.py'
]
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(
        mean=[127.5] * 3, std=[127.5] * 3, size=(256, 256)),
    backbone=dict(
        arch='tiny',
        img_size=256,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='data/vit_tiny/vit_tiny_patch16_224_augreg_'
            'tinyimagenet200.safetensors')),
    neck=dict(in_channels=[192] * 4, out_channels=64),
    decode_head=dict(
        in_channels=[64] * 4, channels=64, num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=64, channels=64, num_classes=11, norm_cfg=norm_cfg))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))
default_hooks = dict(
    checkpoint=dict(interval=500, max_keep_ckpts=2, save_best=None))
