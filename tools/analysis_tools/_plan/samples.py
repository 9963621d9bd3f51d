"""Makes batches on which a model can be measured without its data set."""
from typing import Any

import numpy as np
import torch
from torch import nn


def loss_inputs(model: nn.Module, batch: int, size: tuple[int, int]
                ) -> dict[str, Any]:
    """The inputs for ``model(**inputs, mode='loss')``, as the model's
    data_preprocessor would return them.

    Args:
        model: a segmentor of mmseg, a detector of mmdet, or
            rmoe.ImageClassifier.
        batch: number of images.
        size: their height and width.

    Raises:
        ValueError: for another kind of model.
    """
    images = torch.randn(batch, 3, *size,
                         generator=torch.Generator().manual_seed(0))
    makers = {'mmseg': _segmentation, 'mmdet': _detection}
    for kind in type(model).__mro__:
        library = kind.__module__.split('.')[0]
        if library in makers:
            return dict(inputs=images, data_samples=[
                makers[library](size, i) for i in range(batch)])
    if type(model).__name__ == 'ImageClassifier':
        return dict(inputs=images, data_samples=[0] * batch)
    raise ValueError(
        f'{type(model).__name__} cannot be planned, because the form of its '
        "labels is not known: use a segmentor of mmseg, a detector of mmdet, "
        'or rmoe.ImageClassifier')


def _segmentation(size: tuple[int, int], index: int) -> Any:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    return SegDataSample(
        metainfo=dict(img_shape=size, pad_shape=size),
        gt_sem_seg=PixelData(data=torch.full((1, *size), index % 2)))


def _detection(size: tuple[int, int], index: int) -> Any:
    """A sample with eight objects, each a quarter of the image wide and
    high."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData
    height, width = size
    corners = [(row * height // 2, column * width // 4)
               for row in range(2) for column in range(4)]
    boxes = torch.tensor([[x, y, x + width / 4, y + height / 4]
                          for y, x in corners])
    masks = np.zeros((len(corners), height, width), np.uint8)
    for mask, (y, x) in zip(masks, corners):
        mask[y:y + height // 4, x:x + width // 4] = 1
    return DetDataSample(
        metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size,
                      batch_input_shape=size, scale_factor=(1., 1.)),
        gt_instances=InstanceData(
            bboxes=boxes, labels=torch.zeros(len(corners), dtype=torch.int64),
            masks=BitmapMasks(masks, height, width)))
