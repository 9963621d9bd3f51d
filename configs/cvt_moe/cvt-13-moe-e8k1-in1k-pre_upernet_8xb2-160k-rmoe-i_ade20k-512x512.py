# RMoE-I: its experts were trained in a short stage on the upstream data.
_base_ = [
    './cvt-13-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/schedules/moe.py'
]
model = dict(
    backbone=dict(
        init_cfg=None,
        moe=dict(layers=((), (1, ), (1, 3, 5, 7, 9)), num_experts=8)))
load_from = 'work_dirs/cvt-13-moe-e8k1_8xb128-30e-intermediate_in1k-224x224/epoch_30.pth'
