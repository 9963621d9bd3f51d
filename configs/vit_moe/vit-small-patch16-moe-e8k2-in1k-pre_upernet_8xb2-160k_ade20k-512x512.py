_base_ = [
    './vit-small-patch16-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/schedules/rmoe_d.py'
]
# Every other FFN of the last half is MoE, as in V-MoE.
model = dict(
    backbone=dict(
        moe=dict(
            layers=(7, 9, 11),
            num_experts=8,
            router=dict(type='TokenChoiceRouter', top_k=2))))
