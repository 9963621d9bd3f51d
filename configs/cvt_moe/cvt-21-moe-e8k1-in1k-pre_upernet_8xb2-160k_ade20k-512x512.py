_base_ = [
    './cvt-21-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/schedules/rmoe_d.py'
]
# Every other FFN of the last two stages is MoE.
model = dict(
    backbone=dict(
        moe=dict(
            layers=((), (1, 3), (1, 3, 5, 7, 9, 11, 13, 15)),
            num_experts=8)))
