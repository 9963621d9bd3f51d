# Swin with half the width of Swin-T, on images of 64 pixels, so that a dense
# core can be trained on CPUs.
_base_ = [
    '../_base_/models/classifier_swin.py',
    '../_base_/datasets/tiny_imagenet_100.py', '../_base_/cls_runtime.py',
    '../_base_/schedules/tiny_imagenet.py'
]
# A run this short needs no strong regularisation.
model = dict(
    backbone=dict(embed_dims=48, window_size=4, drop_path_rate=0.),
    in_channels=384,
    num_classes=100,
    mixup=0.,
    cutmix=0.)
