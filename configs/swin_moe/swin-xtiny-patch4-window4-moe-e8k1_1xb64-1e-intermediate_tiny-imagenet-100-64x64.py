# The intermediate stage of RMoE-I: the checkpoint of the dense twin is upcycled
# as it loads. The paper does not give length and rates; they are our choice.
_base_ = [
    './swin-xtiny-patch4-window4_1xb64-7e_tiny-imagenet-100-64x64.py',
    '../_base_/schedules/rmoe_i_intermediate.py'
]
model = dict(
    backbone=dict(moe=dict(layers=((), (), (1, 3, 5), (1, )), num_experts=8)))
optim_wrapper = dict(optimizer=dict(lr=0.0002))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=0, end=1,
        convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=1)
load_from = ('work_dirs/swin-xtiny-patch4-window4_1xb64-7e_'
             'tiny-imagenet-100-64x64/epoch_7.pth')
