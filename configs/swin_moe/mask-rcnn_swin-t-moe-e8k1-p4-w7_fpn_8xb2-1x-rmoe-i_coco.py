# RMoE-I: its experts were trained in a short stage on the upstream data.
_base_ = [
    './mask-rcnn_swin-t-p4-w7_fpn_8xb2-1x_coco.py',
    '../_base_/schedules/moe.py'
]
model = dict(
    backbone=dict(
        init_cfg=None,
        moe=dict(layers=((), (), (1, 3, 5), (1, )), num_experts=8)))
load_from = 'work_dirs/swin-tiny-patch4-window7-moe-e8k1_8xb128-30e-intermediate_in1k-224x224/epoch_30.pth'
