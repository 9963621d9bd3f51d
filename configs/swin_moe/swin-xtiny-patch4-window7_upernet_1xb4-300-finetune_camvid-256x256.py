# Continues from a trained dense model, for as many iterations as the MoE run
# with which it is compared.
_base_ = ['./swin-xtiny-patch4-window7_upernet_1xb4-1k_camvid-256x256.py']
optim_wrapper = dict(optimizer=dict(lr=0.0003))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=25),
    dict(
        type='PolyLR', eta_min=0.0, power=1.0, begin=25, end=300,
        by_epoch=False)
]
train_cfg = dict(max_iters=300, val_interval=300)
