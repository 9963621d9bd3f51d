"""The class of every pixel of an image, for each kind of task."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BACKGROUND = 'background'


def label_map(dataset: Any, index: int, item: Mapping[str, Any],
              num_classes: int) -> Tensor | None:
    """Class ids of an image of a segmentation, detection or classification
    data set.

    Boxes are filled, the smaller ones over the larger ones; what is in none
    of them is the background, whose id is ``num_classes``.

    Args:
        dataset: of mmseg, mmdet or rmoe.
        index: of the image.
        item: what the data set gives for it.
        num_classes: of the data set.

    Returns:
        (height, width) int64, 255 where ignored, of any size: it is laid over
        the whole image. None where the data set says nothing of classes.
    """
    sample = item.get('data_samples')
    if isinstance(sample, int):
        return torch.full((1, 1), sample)
    if sample is not None and 'gt_sem_seg' in sample:
        return sample.gt_sem_seg.data[0].long()
    info = (dataset.get_data_info(index)
            if hasattr(dataset, 'get_data_info') else {})
    if 'instances' in info and 'height' in info:
        return fill_boxes(info['instances'], (info['height'], info['width']),
                          num_classes)
    return None


def fill_boxes(instances: Sequence[Mapping[str, Any]],
               image_hw: tuple[int, int], num_classes: int) -> Tensor:
    """(height, width) int64 class ids of mmdet's instances.

    Args:
        instances: with ``bbox`` (left, top, right, bottom), in pixels, and
            ``bbox_label``; those with an ``ignore_flag`` are left out.
        image_hw: height and width.
        num_classes: the id of the background.
    """
    labels = torch.full(image_hw, num_classes)
    boxes = [([round(side) for side in one['bbox']], one['bbox_label'])
             for one in instances if not one.get('ignore_flag')]
    for (left, top, right, bottom), label in sorted(boxes, key=lambda box: -(
            box[0][2] - box[0][0]) * (box[0][3] - box[0][1])):
        labels[max(top, 0):bottom, max(left, 0):right] = label
    return labels


def class_names(dataset: Any) -> tuple[str, ...]:
    """Of a data set, with the background of a detection data set last."""
    names = tuple(map(str, dataset.metainfo.get('classes') or ()))
    if len(dataset) and hasattr(dataset, 'get_data_info') and (
            'instances' in dataset.get_data_info(0)):
        names += (BACKGROUND, )
    return names
