# ImageNet-1k: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.
dataset_type = 'rmoe.ImageFolder'
data_root = 'data/imagenet'
bicubic = 3
# The augmentation of DeiT, Swin and CvT, by the transforms of torchvision.
# Images are normalised later, in the data preprocessor. So RandomErasing fills
# with the mean colour, which is zero after normalisation, and not with noise.
train_transforms = [
    dict(type='RandomResizedCrop', size=224, interpolation=bicubic),
    dict(type='RandomHorizontalFlip'),
    # timm's m9 is magnitude 9 of 10. timm also skips each operation half of
    # the time.
    dict(
        type='RandAugment', num_ops=2, magnitude=9, num_magnitude_bins=11,
        interpolation=bicubic,
        fill=[124, 116, 104]),
    dict(type='PILToTensor'),
    dict(type='RandomErasing', p=0.25, value=(124, 116, 104))
]
test_transforms = [
    dict(type='Resize', size=256, interpolation=bicubic),
    dict(type='CenterCrop', size=224)
]
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='train'),
        transforms=train_transforms))
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='val'),
        transforms=test_transforms))
test_dataloader = val_dataloader
val_evaluator = dict(type='rmoe.Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
