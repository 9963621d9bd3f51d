# 100 classes of Tiny-ImageNet, 64x64, packed into train.npz and val.npz with
# the arrays bytes, offsets, labels and wnids: see rmoe.PackedImages.
dataset_type = 'rmoe.PackedImages'
data_root = 'data/tiny_imagenet_100'
train_transforms = [
    dict(type='RandomResizedCrop', size=64, scale=(0.4, 1.0)),
    dict(type='RandomHorizontalFlip')
]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='train.npz',
        transforms=train_transforms))
val_dataloader = dict(
    batch_size=128,
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='val.npz'))
test_dataloader = val_dataloader
val_evaluator = dict(type='rmoe.Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
