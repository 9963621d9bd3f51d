"""Non-maximum suppression and overlaps of (x1, y1, x2, y2) boxes.

``offset`` is 1 where a box ends behind its last pixel, as in mmdet before
2.0: it is then one wider and higher than the difference of its corners.
"""

import torch
from torch import Tensor

from rmoe.mmcv_ops.torchvision_ops import exact, load

# mmcv's codes of methods and modes.
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
    """Soft-NMS (1704.04503): overlapping boxes lose score, not their place.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5), written: box and final score, best first.
        iou_threshold: from where naive and linear suppression act.
        sigma: of Gaussian suppression.
        min_score: boxes with less are dropped.
        method: 0 naive, 1 linear, 2 Gaussian.
        offset: see the module.

    Returns:
        Indices of the boxes that are left, in the order of ``dets``.
    """
    left = torch.arange(len(boxes))
    scores = scores.clone()
    kept: list[int] = []
    while len(left):
        # Each turn serves the best that is left and weakens the others.
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
    """For each of the (N, 5) boxes with scores that is kept, its index and
    those of the boxes that it suppressed, by score."""
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
    """Write overlaps to ``ious``: (M, N), or (N,) of pairs if ``aligned``.

    ``mode`` 0 divides the intersection by the union, 1 by the first box.
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
    # Nothing in nothing is 0 / 0 with mmcv too, where the offset is 0.
    ious.copy_(inside / of.clamp_min(offset))


def _with_offset(boxes: Tensor, offset: int) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
