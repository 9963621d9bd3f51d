_base_ = [
    './mask-rcnn_cvt-13_fpn_8xb2-1x_coco.py',
    '../_base_/schedules/rmoe_d.py'
]
# Every other FFN of the last two stages is MoE.
model = dict(
    backbone=dict(
        moe=dict(layers=((), (1, ), (1, 3, 5, 7, 9)), num_experts=8)))
