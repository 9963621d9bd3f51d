# RMoE-I: its experts come from a short stage on the upstream data.
_base_ = [
    './cvt-13-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/schedules/moe.py'
]
model = dict(
    backbone=dict(moe=dict(layers=((), (1, ), (1, 3, 5, 7, 9)), num_experts=8)))
