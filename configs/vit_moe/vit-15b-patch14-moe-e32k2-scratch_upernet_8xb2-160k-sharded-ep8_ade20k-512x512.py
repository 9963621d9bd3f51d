# The 15B model of V-MoE (2106.05974), for planning. Its weights were not
# published; load_from is the place of weights that a user would have to
# provide.
_base_ = [
    './vit-15b-patch14_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/schedules/moe.py', '../_base_/parallel/sharded_ep8.py'
]
model = dict(
    backbone=dict(
        moe=dict(
            layers=dict(every=2),
            num_experts=32,
            core=False,
            align='none',
            router=dict(type='TokenChoiceRouter', top_k=2))))
load_from = 'work_dirs/vit-15b-patch14-moe-e32k2-scratch.pth'
