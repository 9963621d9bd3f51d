"""A segmentor of a few thousand parameters on random images, for hooks."""
import copy
from typing import ClassVar

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from rmoe.backbones import SwinMoE
from rmoe.registry import MODELS

BACKBONE = dict(
    type='rmoe.ToySwin', embed_dims=8, depths=(1, 2), num_heads=(1, 2),
    strides=(4, 2), out_indices=(1, ), window_size=2, drop_path_rate=0.,
    moe=dict(layers=((), (0, 1)), num_experts=4,
             router=dict(type='TokenChoiceRouter', noise_std=0.,
                         loss_weights=dict(importance=0.1))))
STAGES = [dict(name='core', roles=('core', 'head'), end=2),
          dict(name='residual', roles=('residual', 'router', 'head'), end=5),
          dict(name='joint', roles='all')]


@MODELS.register_module(force=True)
class ToySwin(SwinMoE):
    """With a norm that keeps running statistics, as CvT has."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm1 = nn.LayerNorm(16)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return super().forward(self.bn(x))


@MODELS.register_module(force=True)
class ToySegmentor(BaseModel):

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, inputs, labels=None, mode='tensor'):
        logits = self.head(self.backbone(inputs)[0])
        if mode == 'loss':
            return dict(loss_ce=nn.functional.cross_entropy(logits, labels))
        return logits


@DATASETS.register_module(force=True)
class ToyImages(Dataset):
    metainfo: ClassVar = dict(classes=('a', 'b', 'c'))

    def __init__(self, size=32):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(size, 3, 32, 32, generator=generator)
        self.labels = torch.randint(3, (size, 4, 4), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index], labels=self.labels[index])


def toy_model(**moe) -> ToySegmentor:
    backbone = copy.deepcopy(BACKBONE)
    backbone['moe'].update(moe)
    return ToySegmentor(backbone)


def toy_config(work_dir, max_iters=8, hooks=(), backbone=None,
               **options) -> Config:
    """A whole runner config; ``hooks`` are custom hooks."""
    return Config(dict(
        model=dict(type='rmoe.ToySegmentor', backbone=backbone or BACKBONE),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=dict(type='ToyImages'), batch_size=4, num_workers=0,
            sampler=dict(type='InfiniteSampler', shuffle=True, seed=0),
            collate_fn=dict(type='default_collate')),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=max_iters),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05)),
        param_scheduler=dict(type='LinearLR', start_factor=.5, end=6,
                             by_epoch=False),
        default_hooks=dict(checkpoint=dict(
            type='rmoe.CheckpointHook', by_epoch=False, interval=4)),
        custom_hooks=list(hooks), default_scope='mmseg',
        visualizer=dict(type='Visualizer', vis_backends=[
            dict(type='LocalVisBackend')]),
        randomness=dict(seed=0), log_processor=dict(by_epoch=False),
        experiment_name=str(work_dir).replace('/', '_'), **options))


def toy_runner(work_dir, **options) -> Runner:
    return Runner.from_cfg(toy_config(work_dir, **options))


def copied_state(model: nn.Module) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


