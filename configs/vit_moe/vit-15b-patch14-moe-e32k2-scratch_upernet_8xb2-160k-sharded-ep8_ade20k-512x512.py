# V-MoE's 15B (2106.05974), to plan with: its weights were not published, and
# load_from names those one would have to bring.
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
