_base_ = [
    '../_base_/models/upernet_cvt.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k.py'
]
# The weights of Hugging Face were trained with the exact GELU.
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        act_cfg=dict(type='GELU'),
        init_cfg=dict(
            type='Pretrained', checkpoint='hf:microsoft/cvt-13',
            prefix='cvt.')))
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.))
