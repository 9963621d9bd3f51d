_base_ = [
    '../_base_/models/upernet_cvt.py',
    '../_base_/datasets/ade20k_640x640.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k.py'
]
# Hugging Face's weights need exact GELU.
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        arch='21',
        act_cfg=dict(type='GELU'),
        init_cfg=dict(
            type='Pretrained', checkpoint='hf:microsoft/cvt-21',
            prefix='cvt.')))
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.))
