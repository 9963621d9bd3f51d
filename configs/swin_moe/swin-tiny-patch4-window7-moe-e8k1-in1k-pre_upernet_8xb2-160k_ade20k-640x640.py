_base_ = [
    './swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-640x640.py',
    '../_base_/schedules/rmoe_d.py'
]
# Every other FFN of the last two stages is MoE, as in Swin-MoE.
model = dict(
    backbone=dict(moe=dict(layers=((), (), (1, 3, 5), (1, )), num_experts=8)))
