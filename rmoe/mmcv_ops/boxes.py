"""Non-maximum suppression and overlaps of (x1, y1, x2, y2) boxes.

``offset`` is added to the width and height of a box. It is 1 where x2 and y2
are the last pixels of a box, as in mmdet before 2.0, so that the box is one
wider and higher than the difference of its corners; otherwise it is 0.
"""

import torch
from torch import Tensor

from rmoe.mmcv_ops.torchvision_ops import exact, load

# mmcv's numbers for the methods of Soft-NMS and the modes of overlaps.
NAIVE, LINEAR, GAUSSIAN = range(3)
IOU, IOF = range(2)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int
        ) -> Tensor:
    """Indices of the (N, 4) boxes that are kept, best score first."""
    return load().nms(_with_offset(exact(boxes), offset), exact(scores),
                      iou_threshold)


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor,
            iou_threshold: float, sigma: float, min_score: float,
            method: int, offset: int) -> Tensor:
    """Soft-NMS (1704.04503): boxes that overlap a better one are not removed,
    but get a lower score.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5), to which boxes with their final scores are written, best
            first.
        iou_threshold: overlap from which naive and linear suppression act.
        sigma: width of Gaussian suppression.
        min_score: boxes with a lower score are dropped.
        method: 0 naive, 1 linear, 2 Gaussian.
        offset: see the docstring of this module.

    Returns:
        Indices of the boxes that are left, in the order of ``dets``.
    """
    left = torch.arange(len(boxes))
    scores = scores.clone()
    kept: list[int] = []
    while len(left):
        # Each iteration takes the best box that is left, and lowers the scores
        # of the others.
        at = int(scores[left].argmax())
        best = int(left[at])
        dets[len(kept)] = torch.cat([boxes[best], scores[best, None]])
        kept.append(best)
        left = torch.cat([left[:at], left[at + 1:]])
        overlap = torch.empty(len(left), dtype=boxes.dtype)
        bbox_overlaps(boxes[best, None].expand(len(left), 4), boxes[left],
                      overlap, mode=IOU, aligned=True, offset=offset)
        if method == GAUSSIAN:
            weight = torch.exp(-overlap**2 / sigma)
        else:
            loss = torch.ones_like(overlap) if method == NAIVE else overlap
            weight = torch.where(overlap >= iou_threshold, 1 - loss, 1.)
        scores[left] *= weight
        left = left[scores[left] >= min_score]
    return torch.tensor(kept, dtype=torch.long)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """For each kept box of ``dets``, (N, 5) boxes with scores: its index and
    the indices of the boxes that it suppressed, in the order of scores."""
    boxes = dets[:, :4]
    overlaps = boxes.new_empty(len(boxes), len(boxes))
    bbox_overlaps(boxes, boxes, overlaps, mode=IOU, aligned=False, offset=0)
    left = dets[:, 4].argsort(descending=True)
    matched = []
    while len(left):
        best, others = left[0], left[1:]
        suppressed = overlaps[best, others] >= iou_threshold
        matched.append([int(best), *others[suppressed].tolist()])
        left = others[~suppressed]
    return matched


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int,
                  aligned: bool, offset: int) -> None:
    """Write the overlaps of M and N boxes to ``ious``: (M, N), or, if
    ``aligned``, (N,) overlaps of the boxes with the same index.

    An overlap is the area of the intersection, divided by that of the union
    (``mode`` 0) or by that of the first box (``mode`` 1).
    """
    first, second = (_with_offset(exact(boxes), offset)
                     for boxes in (bboxes1, bboxes2))
    area1, area2 = _area(first), _area(second)
    if not aligned:
        first, area1 = first[:, None], area1[:, None]
    top_left = torch.maximum(first[..., :2], second[..., :2])
    bottom_right = torch.minimum(first[..., 2:], second[..., 2:])
    inside = (bottom_right - top_left).clamp_min(0).prod(-1)
    of = area1 if mode == IOF else area1 + area2 - inside
    # As with mmcv, two empty boxes give 0 / 0 where the offset is 0.
    ious.copy_(inside / of.clamp_min(offset))


def _with_offset(boxes: Tensor, offset: int) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
