_base_ = [
    './vit-tiny-patch16-in21k-pre_fcn_1xb4-1k_camvid-256x256.py',
    '../_base_/schedules/rmoe_d.py'
]
# Every other FFN of the last half is MoE, as in V-MoE.
model = dict(backbone=dict(moe=dict(layers=(7, 9, 11), num_experts=8)))
