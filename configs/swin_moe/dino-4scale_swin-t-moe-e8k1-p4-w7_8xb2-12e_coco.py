_base_ = [
    './dino-4scale_swin-t-p4-w7_8xb2-12e_coco.py',
    '../_base_/schedules/rmoe_d.py'
]
# Every other FFN of the last two stages is MoE, as in Swin-MoE.
model = dict(
    backbone=dict(moe=dict(layers=((), (), (1, 3, 5), (1, )), num_experts=8)))
