# The MoE model of `make demo`, which is upcycled and then fine-tuned in stages.
_base_ = [
    './swin-micro_upernet_scenes-128x128.py',
    '../_base_/schedules/rmoe_d.py'
]
model = dict(
    backbone=dict(moe=dict(layers=((), (), (1, 3), (1, )), num_experts=8)))
