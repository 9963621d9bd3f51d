# ViT-Ti with ImageNet-21k weights. On them a head of 1x1 convolutions on the
# last tokens learns in a few hundred iterations, in which UPerNet does not.
_base_ = [
    '../_base_/datasets/camvid.py', '../_base_/default_runtime.py',
    '../_base_/schedules/camvid_1k.py'
]
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5] * 3,
        std=[127.5] * 3,
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(256, 256)),
    backbone=dict(
        type='rmoe.ViTMoE',
        arch='tiny',
        img_size=256,
        # With stochastic depth the score of such a short run is two points
        # lower.
        drop_path_rate=0.0,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='data/vit_tiny/vit_tiny_patch16_224_augreg_'
            'tinyimagenet200.safetensors')),
    decode_head=dict(
        type='FCNHead', in_channels=192, channels=192, kernel_size=1,
        num_convs=1, concat_input=False, dropout_ratio=0.0, num_classes=11,
        norm_cfg=dict(type='BN'), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
optim_wrapper = dict(
    paramwise_cfg=dict(
        layer_decay_rate=0.9, roles=dict(head=dict(lr_mult=5.0))))
default_hooks = dict(
    checkpoint=dict(interval=500, max_keep_ckpts=2, save_best=None))
