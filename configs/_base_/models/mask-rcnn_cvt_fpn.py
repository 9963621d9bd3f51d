# CvT has maps at strides 4, 8 and 16. Convolutions on the last one add maps at
# 32 and 64.
_base_ = './mask-rcnn.py'
model = dict(
    backbone=dict(
        type='rmoe.CvTMoE',
        arch='13',
        # Batch norms keep the statistics of the checkpoint, because those of
        # two images are too noisy.
        norm_eval=True),
    neck=dict(
        type='FPN',
        in_channels=[64, 192, 384],
        out_channels=256,
        add_extra_convs='on_input',
        num_outs=5))
