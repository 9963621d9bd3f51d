"""A figure of a segmentor's prediction and of the experts its patches go to."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from torch import Tensor
from torch.nn import functional as F

from rmoe.moe.recording import record_routing
from rmoe.visualization.routing_figure import draw_routing
from rmoe.visualization.routing_maps import expert_map, load_shares


@torch.no_grad()
def draw_segmentor(model: BaseModel, item: Mapping[str, Any], path: Path,
                   loads: Mapping[str, np.ndarray] | None = None,
                   title: str = '') -> None:
    """Save the figure of one item of a data set.

    Args:
        model: an mmseg segmentor with MoE layers in its backbone, in
            evaluation mode.
        item: the output of a test pipeline: ``inputs`` (3, H, W) BGR uint8
            and ``data_samples``.
        path: the PNG file to write.
        loads: for each layer the (E,) shares of its experts; None takes those
            of this image.
        title: title of the figure.

    Raises:
        ValueError: if the backbone has no MoE layer.
    """
    data = model.data_preprocessor(pseudo_collate([item]), False)
    sample = model(**data, mode='predict')[0]
    with record_routing(model) as records:
        model.extract_feat(data['inputs'])
    # Heads did not run: their tokens need not be patches of the image.
    drawn = {name: routings for name, routings in records.items() if routings}
    if not drawn:
        raise ValueError('the backbone has no MoE layer to draw: give a model '
                         'whose backbone has moe=dict(layers=...)')
    image_hw = tuple(data['inputs'].shape[-2:])
    image = item['inputs'].permute(1, 2, 0).flip(-1).cpu().numpy()
    meta = getattr(model, 'dataset_meta', None) or {}
    truth = sample.get('gt_sem_seg')
    draw_routing(
        image,
        {short_name(name): expert_map(routings[0], image_hw)
         for name, routings in drawn.items()},
        {short_name(name): (loads[name] if loads else load_shares(routings))
         for name, routings in drawn.items()},
        path,
        segmentation=_fit(sample.pred_sem_seg.data, image.shape),
        truth=None if truth is None else _fit(truth.data, image.shape),
        palette=meta.get('palette'), classes=meta.get('classes'), title=title)


def _fit(labels: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Resize (1, h, w) class ids to the size of the shown image."""
    labels = F.interpolate(labels[None].float(), shape[:2], mode='nearest')
    return labels[0, 0].long().cpu().numpy()


def short_name(name: str) -> str:
    """A short name for figures: 'stage 2 block 1' for
    'backbone.stages.2.blocks.1.ffn'."""
    parts = name.split('.')
    words = [f'{word[:-1]} {number}' for word, number in zip(parts, parts[1:])
             if number.isdigit()]
    return ' '.join(words) or name
