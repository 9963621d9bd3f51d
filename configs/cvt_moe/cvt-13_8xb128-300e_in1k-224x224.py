# CvT warms up for 5 epochs. The learning rate is that in its code, 0.00025 for
# 256 images.
_base_ = [
    '../_base_/models/classifier_cvt.py', '../_base_/datasets/imagenet.py',
    '../_base_/cls_runtime.py', '../_base_/schedules/imagenet_300e.py'
]
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=5,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5,
        end=300, convert_to_iter_based=True)
]
