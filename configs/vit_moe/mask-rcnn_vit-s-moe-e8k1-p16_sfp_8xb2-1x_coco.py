_base_ = [
    './mask-rcnn_vit-s-p16_sfp_8xb2-1x_coco.py',
    '../_base_/schedules/rmoe_d.py'
]
# Every other FFN of the last half is MoE, as in V-MoE.
model = dict(backbone=dict(moe=dict(layers=(7, 9, 11), num_experts=8)))
