# The dense model of `make demo`, which trains in minutes on two CPU cores.
_base_ = [
    '../_base_/models/upernet_swin.py', '../_base_/datasets/scenes.py',
    '../_base_/default_runtime.py'
]
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        embed_dims=32, num_heads=(1, 2, 4, 8), depths=(2, 2, 4, 2),
        window_size=4, drop_path_rate=0.05),
    decode_head=dict(
        in_channels=[32, 64, 128, 256], channels=48, num_classes=7,
        dropout_ratio=0., norm_cfg=norm_cfg),
    auxiliary_head=None)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.01),
    clip_grad=dict(max_norm=5.0),
    constructor='rmoe.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(norm_decay_mult=0.))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=600, val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, by_epoch=False, begin=30, end=600)
]
default_hooks = dict(
    checkpoint=dict(interval=10000, save_best=None, save_last=True))
randomness = dict(seed=0)
