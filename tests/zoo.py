"""The leaf configs, and each of them at eight channels."""
import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from rmoe.registry import MODELS

ROOT = Path(__file__).parent.parent
# configs/pipelines names leaves and has no model of its own.
LEAVES = sorted(path for path in (ROOT / 'configs').glob('*/*.py')
                if path.parent.name not in ('_base_', 'pipelines',
                                           'experiments'))
SIDE = 64
# What heads have besides their classes, at a few channels and proposals.
SMALL = dict(
    channels=8, in_channels=16, out_channels=16, feat_channels=16,
    conv_out_channels=16, fc_out_channels=16, stacked_convs=1, num_convs=1,
    num=16, nms_pre=50, max_per_img=20, num_queries=20, num_layers=1,
    embed_dims=16, feedforward_channels=16, num_feats=8, num_groups=4,
    num_dn_queries=4)
DINO_SMALL = ('num_queries', 'num_layers', 'feedforward_channels',
              'num_dn_queries', 'max_per_img')


@cache
def _load(path: Path) -> Config:
    return Config.fromfile(path)


def load(path: Path) -> Config:
    return copy.deepcopy(_load(path))


def kind_of(cfg: Config) -> str:
    if 'decode_head' in cfg.model:
        return 'seg'
    return 'det' if 'bbox_head' in cfg.model or 'roi_head' in cfg.model else (
        'cls')


def parts(node: object) -> Iterator[dict]:
    """Every dict in a config, itself included."""
    if isinstance(node, dict):
        yield node
        node = node.values()
    if not isinstance(node, str) and hasattr(node, '__iter__'):
        for item in node:
            yield from parts(item)


def scope(cfg: Config):
    return DefaultScope.overwrite_default_scope(cfg.default_scope)


def dense_backbone(cfg: Config) -> nn.Module:
    """The backbone as large as it is, without weights or experts."""
    return _dense_backbone(str(dict(cfg.model.backbone, moe=None,
                                    init_cfg=None)))


@cache
def _dense_backbone(settings: str) -> nn.Module:
    with torch.device('meta'):
        return MODELS.build(eval(settings))


def widths_of(backbone: nn.Module) -> list[int]:
    """Channels of the maps it returns."""
    widths = (backbone.num_features if hasattr(backbone, 'num_features') else
              backbone.embed_dims)
    if isinstance(widths, int):
        return [widths] * len(backbone.out_indices)
    return [widths[i] for i in backbone.out_indices]


def shrink(cfg: Config) -> Config:
    """The same blocks, MoE layers, heads, losses and classes, but eight
    channels, images of SIDE pixels and a few proposals."""
    backbone, whole = cfg.model.backbone, dense_backbone(cfg)
    backbone.update(arch=None, init_cfg=None)
    if backbone.type == 'rmoe.SwinMoE':
        backbone.update(embed_dims=8, depths=whole.depths,
                        num_heads=(1, 1, 2, 2))
    elif backbone.type == 'rmoe.CvTMoE':
        backbone.update(embed_dims=(8, 8, 16), depths=whole.depths,
                        num_heads=(1, 1, 2))
    else:
        backbone.update(embed_dims=8, num_layers=whole.num_layers,
                        num_heads=2, mlp_dims=16)
    widths = widths_of(dense_backbone(cfg))
    rest = [part for key, part in cfg.model.items()
            if key not in ('backbone', 'data_preprocessor')]
    # mmdet's DINO encodes its reference points for 256 channels only.
    small = {key: value for key, value in SMALL.items()
             if cfg.model.type != 'DINO' or key in DINO_SMALL}
    for part in [*parts(rest), cfg.model]:
        part.update({key: small[key] for key in small.keys() & part.keys()})
    if 'neck' in cfg.model:
        cfg.model.neck.in_channels = (
            widths[-1] if cfg.model.neck.type == 'rmoe.SimpleFeaturePyramid'
            else widths)
        widths = [16] * len(widths)
    if kind_of(cfg) == 'seg':
        cfg.model.data_preprocessor.size = (SIDE, SIDE)
        cfg.model.decode_head.in_channels = (
            widths if cfg.model.decode_head.type == 'UPerHead'
            else widths[-1])
        if cfg.model.get('auxiliary_head'):
            cfg.model.auxiliary_head.in_channels = widths[
                cfg.model.auxiliary_head.in_index]
    elif kind_of(cfg) == 'cls':
        cfg.model.in_channels = widths[-1]
    return cfg


def batch(cfg: Config) -> dict:
    """What a dataloader gives: two pictures, what is in them."""
    return dict(
        inputs=[torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)
                for _ in range(2)],
        data_samples=[SAMPLES[kind_of(cfg)](i) for i in range(2)])


def _seg_sample(i: int) -> object:
    from mmseg.structures import SegDataSample
    return SegDataSample(
        metainfo=dict(img_shape=(SIDE, SIDE)),
        gt_sem_seg=PixelData(data=torch.full((1, SIDE, SIDE), i)))


def det_sample(i: int, shape: tuple[int, int] = (SIDE, SIDE)) -> object:
    """Two boxes of classes i and 0, filled."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    boxes = torch.tensor([[4., 8., 44., 40.], [20. + i, 6., 60., 60.]])
    masks = np.zeros((2, *shape), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int()):
        mask[y1:y2, x1:x2] = 1
    return DetDataSample(
        metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape,
                      batch_input_shape=shape, scale_factor=(1., 1.)),
        gt_instances=InstanceData(bboxes=boxes, labels=torch.tensor([i, 0]),
                                  masks=BitmapMasks(masks, *shape)))


SAMPLES = dict(seg=_seg_sample, det=det_sample, cls=lambda i: i)
