# RMoE-I: its experts were trained in a short stage on the upstream data.
_base_ = ['./cvt-xtiny_upernet_1xb4-1k_camvid-256x256.py', '../_base_/schedules/moe.py']
model = dict(backbone=dict(moe=dict(layers=((), (1, ), (1, 3, 5)), num_experts=8)))
load_from = 'work_dirs/cvt-xtiny-moe-e8k1_1xb64-1e-intermediate_tiny-imagenet-100-64x64/epoch_1.pth'
