_base_ = [
    './swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/schedules/rmoe_d.py'
]
# Alternate FFNs of the last two stages, as in Swin-MoE; residuals of rank 16.
model = dict(
    backbone=dict(
        moe=dict(
            layers=((), (), (1, 3, 5), (1, )),
            num_experts=8,
            rank=16)))
