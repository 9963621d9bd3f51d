# The pyramid of ViTDet, which makes maps at strides 4 to 32 from the one map at
# stride 16, and one at 64.
_base_ = './mask-rcnn.py'
model = dict(
    backbone=dict(type='rmoe.ViTMoE', arch='small', drop_path_rate=0.1),
    neck=dict(
        type='rmoe.SimpleFeaturePyramid',
        in_channels=384,
        out_channels=256,
        num_outs=5))
