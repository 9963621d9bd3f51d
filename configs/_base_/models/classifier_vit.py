# ViT-S as an image classifier, which classifies the class token.
data_preprocessor = dict(
    type='ImgDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375])
model = dict(
    type='rmoe.ImageClassifier',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='rmoe.ViTMoE',
        arch='small',
        output_cls_token=True,
        drop_path_rate=0.1),
    in_channels=384,
    num_classes=1000,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0)
