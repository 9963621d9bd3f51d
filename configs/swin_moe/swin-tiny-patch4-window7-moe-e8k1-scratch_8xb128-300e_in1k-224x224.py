# MoE from scratch, with experts without a core: the upper bound of the RMoE
# paper.
_base_ = [
    './swin-tiny-patch4-window7_8xb128-300e_in1k-224x224.py',
    '../_base_/schedules/moe.py'
]
model = dict(
    backbone=dict(
        moe=dict(
            layers=((), (), (1, 3, 5), (1, )), num_experts=8, core=False)))
