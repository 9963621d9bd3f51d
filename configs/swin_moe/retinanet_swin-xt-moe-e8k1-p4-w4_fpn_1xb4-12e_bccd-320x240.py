_base_ = [
    './retinanet_swin-xt-p4-w4_fpn_1xb4-12e_bccd-320x240.py',
    '../_base_/schedules/rmoe_d.py'
]
model = dict(
    backbone=dict(moe=dict(layers=((), (), (1, 3, 5), (1, )), num_experts=8)))
