# Eight images of COCO 2017 for training and evaluation, to see that a model can
# overfit them. They are the first eight of the annotation file with two to six
# objects, of which none is a crowd or small in the sense of COCO (less than
# 32 x 32 pixels).
_base_ = './coco_instance.py'
data_root = 'data/coco_mini/'
indices = [4, 14, 15, 22, 23, 28, 29, 36]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(320, 320), keep_ratio=True),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(320, 320), keep_ratio=True),
    # Annotations are loaded after Resize, so that they keep their size.
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        # The evaluator takes its ground truth from the instances, which are
        # those of the file. CocoMetric(ann_file=...) would evaluate all
        # images of the file.
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                   'scale_factor', 'instances'))
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    batch_sampler=None,
    dataset=dict(
        data_root=data_root,
        filter_cfg=None,
        indices=indices,
        pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        indices=indices,
        pipeline=test_pipeline))
test_dataloader = val_dataloader
# The AP by size is left out, because without ann_file the metric takes the area
# of the box for that of the object.
val_evaluator = dict(ann_file=None, metric_items=['mAP', 'mAP_50', 'mAP_75'])
test_evaluator = val_evaluator
