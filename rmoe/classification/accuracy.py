"""Top-k accuracy."""
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from rmoe.registry import METRICS


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Percentage of images whose class is among the k with the highest
    scores, as ``accuracy/top1`` and so on.

    Args:
        topk: the values of k.
        collect_device: where results of ranks are gathered: 'cpu' or 'gpu'.
        prefix: first part of the names of the results; None means
            'accuracy'.

    Raises:
        ValueError: if a k is below 1 or, from the first image on, above the
            number of classes.
    """
    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5),
                 collect_device: str = 'cpu',
                 prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if not topk or min(topk) < 1:
            raise ValueError(f'topk={tuple(topk)} must hold numbers from 1 on')
        self.topk = tuple(topk)

    def process(self, data_batch: Any,
                data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep for each image the rank that its class has among the scores.

        Args:
            data_batch: not used.
            data_samples: predictions of the classifier: ``pred_score`` (C)
                and ``gt_label`` of each image.
        """
        for sample in data_samples:
            scores_C = sample['pred_score']
            if max(self.topk) > len(scores_C):
                raise ValueError(f'topk={self.topk} asks for more than the '
                                 f'{len(scores_C)} classes: set topk of the '
                                 'metric to smaller numbers')
            best = torch.topk(scores_C, max(self.topk)).indices.tolist()
            label = int(sample['gt_label'])
            self.results.append(
                best.index(label) if label in best else len(scores_C))

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """Percentages from the ranks that the classes of all images have."""
        return {
            f'top{k}': 100 * sum(place < k for place in results) /
            len(results) for k in self.topk
        }
