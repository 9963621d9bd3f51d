"""A classifier of a few thousand parameters, and images drawn for it."""
import io
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from rmoe.classification import Accuracy

# Colours of the classes.
COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200))
WNIDS = ('n01', 'n02', 'n03')


def draw_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Noise around the colour of the class; image i is of class i % 3."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(np.clip(
        np.array(COLOURS[i % 3]) + rng.normal(0, 40, (32, 32, 3)), 0, 255
    ).astype(np.uint8)) for i in range(count)]


def encode(image: Image.Image, kind: str = 'PNG') -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def pack(path: Path, files: list[bytes], labels, wnids=WNIDS) -> Path:
    np.savez(path, bytes=np.frombuffer(b''.join(files), np.uint8),
             offsets=np.cumsum([0, *map(len, files)]),
             labels=np.array(labels, np.int16), wnids=np.array(wnids))
    return path


SWIN = dict(
    type='rmoe.SwinMoE', embed_dims=8, depths=(1, 2), num_heads=(1, 2),
    strides=(4, 2), out_indices=(1, ), window_size=2, drop_path_rate=0.2)


def dataloader(folder, split: str, transforms=()) -> dict:
    return dict(
        batch_size=8, num_workers=0, drop_last=split == 'train',
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=split == 'train'),
        dataset=dict(type='rmoe.PackedImages', data_root=str(folder),
                     ann_file=f'{split}.npz', transforms=list(transforms)))


def classifier_config(folder, work_dir, backbone=None, epochs=4, model=None,
                      transforms=(), hooks=(), **options) -> Config:
    """A whole config of a classifier with a few thousand parameters."""
    return Config(dict(
        model=dict(
            type='rmoe.ImageClassifier', backbone=backbone or SWIN,
            num_classes=3, in_channels=16, **(model or {}),
            data_preprocessor=dict(type='ImgDataPreprocessor',
                                   mean=[128.] * 3, std=[64.] * 3)),
        work_dir=str(work_dir),
        train_dataloader=dataloader(folder, 'train', transforms),
        val_dataloader=dataloader(folder, 'val'),
        test_dataloader=dataloader(folder, 'val'),
        val_evaluator=dict(type='rmoe.Accuracy', topk=(1, 2)),
        test_evaluator=dict(type='rmoe.Accuracy', topk=(1, 2)),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=epochs,
                       val_interval=1),
        val_cfg=dict(type='ValLoop'), test_cfg=dict(type='TestLoop'),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='rmoe.CheckpointHook', interval=1,
                            save_best='accuracy/top1'),
            class_check=dict(type='rmoe.ClassCheckHook')),
        custom_hooks=list(hooks), default_scope='mmengine',
        visualizer=dict(type='Visualizer', vis_backends=[
            dict(type='LocalVisBackend')]),
        randomness=dict(seed=0), log_level='WARNING',
        experiment_name=str(work_dir).replace('/', '_'), **options))


def run_training(*args, **options) -> Runner:
    runner = Runner.from_cfg(classifier_config(*args, **options))
    runner.train()
    return runner


def accuracy_of_a_rank(rank: int, work_dir: str, places: list[int]) -> dict:
    """What a rank of two finds for images whose classes have these places;
    the sampler deals them out and repeats the first to fill up."""
    metric = Accuracy(topk=(1, 2))
    places = places + places[:len(places) % 2]
    scores = torch.arange(4., 0., -1.)
    metric.process(None, [dict(pred_score=scores, gt_label=place)
                          for place in places[rank::2]])
    return metric.evaluate(len(places) - 1)
