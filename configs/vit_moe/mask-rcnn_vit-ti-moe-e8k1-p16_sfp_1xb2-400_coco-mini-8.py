_base_ = [
    './mask-rcnn_vit-ti-p16_sfp_1xb2-400_coco-mini-8.py',
    '../_base_/schedules/rmoe_d.py'
]
model = dict(backbone=dict(moe=dict(layers=(7, 9, 11), num_experts=8)))
