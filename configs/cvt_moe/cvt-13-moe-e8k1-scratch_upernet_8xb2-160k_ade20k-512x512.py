# Its checkpoint was MoE from the start of upstream training; see
# configs/pipelines.
_base_ = [
    './cvt-13-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/schedules/moe.py'
]
model = dict(
    backbone=dict(
        init_cfg=None,
        moe=dict(layers=((), (1, ), (1, 3, 5, 7, 9)), num_experts=8, core=False)))
load_from = 'work_dirs/cvt-13-moe-e8k1-scratch_8xb128-300e_in1k-224x224/epoch_300.pth'
