# Its checkpoint was MoE from the start of upstream training; see
# configs/pipelines.
_base_ = ['./cvt-xtiny_upernet_1xb4-1k_camvid-256x256.py', '../_base_/schedules/moe.py']
model = dict(
    backbone=dict(moe=dict(layers=((), (1, ), (1, 3, 5)), num_experts=8, core=False)))
load_from = 'work_dirs/cvt-xtiny-moe-e8k1-scratch_1xb64-7e_tiny-imagenet-100-64x64/epoch_7.pth'
