# The intermediate stage of RMoE-I: the checkpoint of the dense twin is upcycled
# as it loads. imagenet_30e_intermediate.py has the length and the rates.
_base_ = [
    '../_base_/models/classifier_swin.py', '../_base_/datasets/imagenet.py',
    '../_base_/cls_runtime.py',
    '../_base_/schedules/imagenet_30e_intermediate.py'
]
model = dict(
    backbone=dict(moe=dict(layers=((), (), (1, 3, 5), (1, )), num_experts=8)))
load_from = 'work_dirs/swin-tiny-patch4-window7_8xb128-300e_in1k-224x224/epoch_300.pth'
