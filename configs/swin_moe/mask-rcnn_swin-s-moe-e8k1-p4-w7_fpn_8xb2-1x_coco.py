_base_ = [
    './mask-rcnn_swin-s-p4-w7_fpn_8xb2-1x_coco.py',
    '../_base_/schedules/rmoe_d.py'
]
# Every other FFN of the last two stages is MoE, as in Swin-MoE.
model = dict(
    backbone=dict(
        moe=dict(
            layers=((), (), (1, 3, 5, 7, 9, 11, 13, 15, 17), (1, )),
            num_experts=8)))
