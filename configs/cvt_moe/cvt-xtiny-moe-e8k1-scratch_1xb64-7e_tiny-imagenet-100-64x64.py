# MoE from scratch, with experts without a core: the upper bound of the RMoE
# paper.
_base_ = ['./cvt-xtiny_1xb64-7e_tiny-imagenet-100-64x64.py', '../_base_/schedules/moe.py']
model = dict(
    backbone=dict(moe=dict(layers=((), (1, ), (1, 3, 5)), num_experts=8, core=False)))
