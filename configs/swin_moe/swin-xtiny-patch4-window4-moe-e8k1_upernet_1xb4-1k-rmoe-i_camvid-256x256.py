# RMoE-I: its experts were trained in a short stage on the upstream data.
_base_ = [
    './swin-xtiny-patch4-window4_upernet_1xb4-1k_camvid-256x256.py',
    '../_base_/schedules/moe.py'
]
model = dict(
    backbone=dict(moe=dict(layers=((), (), (1, 3, 5), (1, )), num_experts=8)))
load_from = 'work_dirs/swin-xtiny-patch4-window4-moe-e8k1_1xb64-1e-intermediate_tiny-imagenet-100-64x64/epoch_1.pth'
