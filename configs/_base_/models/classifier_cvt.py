# CvT-13 as an image classifier. The class token takes part in the attention of
# the last stage, but the mean of the last map is classified, because backbones
# of rmoe return maps.
data_preprocessor = dict(
    type='ImgDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375])
model = dict(
    type='rmoe.ImageClassifier',
    data_preprocessor=data_preprocessor,
    # The exact GELU, which the weights of Hugging Face need, as in the
    # downstream configs.
    backbone=dict(
        type='rmoe.CvTMoE', arch='13', act_cfg=dict(type='GELU'),
        out_indices=(2, )),
    in_channels=384,
    num_classes=1000,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0)
