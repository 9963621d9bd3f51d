_base_ = [
    '../_base_/models/mask-rcnn_cvt_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/det_runtime.py',
    '../_base_/schedules/coco_1x.py'
]
# The weights of Hugging Face were trained with the exact GELU.
model = dict(
    backbone=dict(
        act_cfg=dict(type='GELU'),
        init_cfg=dict(
            type='Pretrained', checkpoint='hf:microsoft/cvt-13',
            prefix='cvt.')))
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.))
