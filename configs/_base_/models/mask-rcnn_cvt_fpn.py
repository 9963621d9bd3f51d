# CvT has strides 4, 8 and 16; convolutions on its last map add 32 and 64.
_base_ = './mask-rcnn.py'
model = dict(
    backbone=dict(
        type='rmoe.CvTMoE',
        arch='13',
        # Two images are too few for batch norms to learn from.
        norm_eval=True),
    neck=dict(
        type='FPN',
        in_channels=[64, 192, 384],
        out_channels=256,
        add_extra_convs='on_input',
        num_outs=5))
