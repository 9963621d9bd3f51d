_base_ = [
    './vit-base-patch16-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/schedules/rmoe_d.py'
]
# Alternate FFNs of the last half, as in V-MoE.
model = dict(backbone=dict(moe=dict(layers=(7, 9, 11), num_experts=16)))
