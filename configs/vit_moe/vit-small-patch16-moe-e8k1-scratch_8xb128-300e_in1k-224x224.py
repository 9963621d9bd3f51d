# MoE from scratch, with experts without a core: the upper bound of the RMoE
# paper.
_base_ = [
    './vit-small-patch16_8xb128-300e_in1k-224x224.py',
    '../_base_/schedules/moe.py'
]
model = dict(
    backbone=dict(
        moe=dict(
            layers=(7, 9, 11), num_experts=8, core=False)))
