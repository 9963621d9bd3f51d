# CvT with half the width of CvT-13, on images of 64 pixels, so that a dense
# core can be trained on CPUs.
_base_ = [
    '../_base_/models/classifier_cvt.py',
    '../_base_/datasets/tiny_imagenet_100.py', '../_base_/cls_runtime.py',
    '../_base_/schedules/tiny_imagenet.py'
]
# A run this short needs no strong regularisation.
model = dict(
    backbone=dict(
        arch=None, embed_dims=(32, 96, 192), depths=(1, 2, 6),
        drop_path_rates=(0., 0., 0.)),
    in_channels=192,
    num_classes=100,
    mixup=0.,
    cutmix=0.)
