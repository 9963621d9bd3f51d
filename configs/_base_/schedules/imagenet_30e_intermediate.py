# The intermediate stage of RMoE-I, with a tenth of the epochs of the dense
# training and a tenth of its learning rate. The paper does not give length and
# rates; they are the choice of this project.
_base_ = ['./imagenet_300e.py', './rmoe_i_intermediate.py']
optim_wrapper = dict(optimizer=dict(lr=0.0001))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=1,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=1,
        end=30, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=30)
