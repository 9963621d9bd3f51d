"""Finds the class of every pixel of an image, for segmentation, detection and
classification."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BACKGROUND = 'background'


def label_map(dataset: Any, index: int, item: Mapping[str, Any],
              num_classes: int) -> Tensor | None:
    """The class ids of an image of a segmentation, detection or classification
    data set.

    In detection, boxes are filled with their class, the smaller ones over the
    larger ones. Pixels in no box are background, with the id ``num_classes``.

    Args:
        dataset: a data set of mmseg, mmdet or rmoe.
        index: the index of the image.
        item: the item of the data set at this index.
        num_classes: the number of classes of the data set.

    Returns:
        (height, width) int64, 255 where a pixel is ignored. It covers the
        whole image, but may have another size. None if the data set has no
        labels.
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
    """Draw the boxes of mmdet's instances as a label map.

    Args:
        instances: dicts with ``bbox`` (left, top, right, bottom), in pixels,
            and ``bbox_label``; those with an ``ignore_flag`` are left out.
        image_hw: height and width of the image.
        num_classes: the id of the background.

    Returns:
        (height, width) int64 class ids.
    """
    labels = torch.full(image_hw, num_classes)
    boxes = [([round(side) for side in one['bbox']], one['bbox_label'])
             for one in instances if not one.get('ignore_flag')]
    for (left, top, right, bottom), label in sorted(boxes, key=lambda box: -(
            box[0][2] - box[0][0]) * (box[0][3] - box[0][1])):
        labels[max(top, 0):bottom, max(left, 0):right] = label
    return labels


def class_names(dataset: Any) -> tuple[str, ...]:
    """The names of the classes of a data set. For detection, the background is
    added as the last one."""
    names = tuple(map(str, dataset.metainfo.get('classes') or ()))
    if len(dataset) and hasattr(dataset, 'get_data_info') and (
            'instances' in dataset.get_data_info(0)):
        names += (BACKGROUND, )
    return names
