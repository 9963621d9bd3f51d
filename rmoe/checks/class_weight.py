"""Makes mmseg's cross entropy with class weights work on label maps that have
ignored pixels, where mmseg itself fails."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class WeightedMean:
    """The cross entropy of mmseg's ``CrossEntropyLoss`` (softmax), with
    another computation of the mean under class weights.

    For the mean mmseg 1.2.2 looks up the class weight of every pixel, also of
    ignored ones, and fails with "index 255 is out of bounds". This class
    looks up only those of labelled pixels. With ``avg_non_ignore=True`` the
    sum of losses is divided by the sum of the weights of the labelled pixels,
    as in torch's cross_entropy. Otherwise ignored pixels count with a weight
    of 1, so that the result with all class weights 1 is that without class
    weights.

    Args:
        host: the function of mmseg.
    """

    def __init__(self, host: Callable[..., Tensor]) -> None:
        self.host = host

    def __call__(self, pred: Tensor, label: Tensor,
                 weight: Tensor | None = None,
                 class_weight: Tensor | None = None,
                 reduction: str = 'mean',
                 avg_factor: float | Tensor | None = None,
                 ignore_index: int = -100,
                 avg_non_ignore: bool = False) -> Tensor:
        """Compute the loss, as mmseg's function does.

        Args:
            pred: (B, classes, height, width) logits.
            label: (B, height, width) labels.
            weight: a weight for each pixel.
            class_weight: (classes, ) weights.
        """
        if class_weight is not None and avg_factor is None and (
                reduction == 'mean'):
            ignored = label == ignore_index
            of_pixels = class_weight[label.masked_fill(ignored, 0)]
            avg_factor = torch.where(
                ignored, 0. if avg_non_ignore else 1., of_pixels).sum()
        return self.host(
            pred, label, weight, class_weight=class_weight,
            reduction=reduction, avg_factor=avg_factor,
            ignore_index=ignore_index, avg_non_ignore=avg_non_ignore)


def let_weights_meet_ignored_pixels(model: nn.Module) -> list[str]:
    """Replace the function of mmseg in those losses of a model that have class
    weights. Other losses are not changed, and neither is mmseg.

    Returns:
        The names of these losses.
    """
    # The function is recognised by its name, because mmseg may not be
    # installed.
    found = []
    for name, module in model.named_modules():
        host: Any = getattr(module, 'cls_criterion', None)
        if (getattr(module, 'class_weight', None) is not None and
                getattr(host, '__name__', '') == 'cross_entropy' and
                getattr(host, '__module__', '').startswith('mmseg.')):
            module.cls_criterion = WeightedMean(host)
            found.append(name)
    return found
