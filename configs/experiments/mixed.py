# Measures whether experts help where a backbone has to serve images that have
# nothing in common: a ViT-Ti learns to segment the streets of CamVid and the
# blood cells of BCCD at the same time, with a head for each. The variants are
# paired as in the plan 'recipe'.
pipelines = {
    name: ['start', name] for name in ('dense', 'e1', 'e4', 'e4-told')
}
DENSE = '../vit_moe/vit-tiny-patch16-in21k-pre_fcn_1xb4-1k_camvid-256x256.py'
MOE = '../vit_moe/vit-tiny-patch16-moe-e8k1-in21k-pre_fcn_1xb4-1k_camvid-256x256.py'
steps = {
    'start': DENSE,
    'dense': DENSE,
    **{name: MOE for name in ('e1', 'e4', 'e4-told')}
}
STREETS = ('Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'SignSymbol',
           'Fence', 'Car', 'Pedestrian', 'Bicyclist')
CELLS = ('Background', 'RBC', 'WBC', 'Platelets')
meta_keys = ('img_path', 'ori_shape', 'img_shape', 'pad_shape',
             'scale_factor', 'flip', 'flip_direction', 'dataset')
camvid = dict(
    type='BaseSegDataset',
    data_root='data/camvid',
    metainfo=dict(classes=STREETS))
bccd = dict(type='CellDataset', data_root='data/bccd')
labels = dict(
    camvid=dict(type='LoadAnnotations'), bccd=dict(type='DrawCells'))


def pack(name):
    return [
        dict(type='NameDataset', name=name),
        dict(type='PackSegInputs', meta_keys=meta_keys)
    ]


def train_pipeline(name):
    return [
        dict(type='LoadImageFromFile'), labels[name],
        dict(
            type='RandomResize', scale=(480, 360), ratio_range=(0.75, 1.5),
            keep_ratio=True),
        dict(type='RandomCrop', crop_size=(256, 256), cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'), *pack(name)
    ]


def test_pipeline(name):
    return [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(480, 360), keep_ratio=True),
        # Labels are loaded after Resize, so that they keep their size.
        labels[name], *pack(name)
    ]


def both(split, pipeline):
    return dict(
        _delete_=True, type='ConcatDataset',
        ignore_keys=['classes', 'palette'], datasets=[
            dict(
                **camvid, pipeline=pipeline('camvid'), data_prefix=dict(
                    img_path=f'img_dir/{split}',
                    seg_map_path=f'ann_dir/{split}')),
            dict(
                **bccd, pipeline=pipeline('bccd'),
                ann_file=f'annotations/{split}.json',
                data_prefix=dict(img_path='images'))
        ])


def head(classes):
    return dict(
        type='FCNHead', in_channels=192, channels=192, kernel_size=1,
        num_convs=1, concat_input=False, dropout_ratio=0.0,
        num_classes=len(classes), norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0))


evaluator = dict(
    _delete_=True, type='IoUOfDatasets',
    classes=dict(camvid=STREETS, bccd=CELLS))
mixed = {
    # It is relative to the folder of train.py.
    'custom_imports': dict(imports=['experiments.two_data_sets']),
    'model.type': 'SegmentorOfDatasets',
    'model.decode_head': dict(
        _delete_=True, type='HeadForEachDataset',
        heads=dict(camvid=head(STREETS), bccd=head(CELLS))),
    'train_dataloader.dataset': both('train', train_pipeline),
    'val_dataloader.dataset': both('val', test_pipeline),
    'test_dataloader.dataset': both('val', test_pipeline),
    'val_evaluator': evaluator,
    'test_evaluator': evaluator
}
short = {
    **mixed, 'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper',
    'param_scheduler.1.end': 600,
    'train_cfg.max_iters': 600,
    'train_cfg.val_interval': 600
}
hooks = [
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.RoutingStatsHook', interval=100)
]


def moe(number):
    return {
        **short, 'custom_hooks': hooks,
        'model.backbone.moe.num_experts': number
    }


options = {
    # One iteration with learning rate zero, whose checkpoint has the randomly
    # initialised heads.
    'start': {
        **short, 'param_scheduler': [],
        'optim_wrapper.optimizer.lr': 0.,
        'optim_wrapper.optimizer.weight_decay': 0.,
        'train_cfg.max_iters': 1,
        'train_cfg.val_interval': 1
    },
    'dense': short,
    'e1': moe(1),
    'e4': moe(4),
    # Two of the four experts are for streets, the other two for cells.
    'e4-told': {
        **moe(4), 'model.backbone.moe.router': dict(
            type='TokenChoiceRouter', scorer=dict(type='DatasetScorer'))
    }
}
