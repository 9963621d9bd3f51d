"""Class weights beside ignored pixels, where mmseg cannot have both."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class WeightedMean:
    """The function of mmseg's ``CrossEntropyLoss`` (softmax), with the mean
    that it takes under class weights computed without looking up the weight
    of the ignored label: mmseg 1.2.2 does, and fails with "index 255 is out
    of bounds".

    With ``avg_non_ignore=True`` the sum of losses is divided by the weights
    of the labelled pixels, as torch's cross_entropy does it; otherwise ignored
    pixels count as if their weight were 1, so that weights of 1 change
    nothing.

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
        """As mmseg's function.

        Args:
            pred: (B, classes, height, width) logits.
            label: (B, height, width).
            weight: for each pixel.
            class_weight: (classes, ).
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
    """Stand in for mmseg's mean in the losses of a model that have class
    weights; others stay as they are, and so does mmseg.

    Returns:
        The names of these losses.
    """
    # Known by name: mmseg need not be installed.
    found = []
    for name, module in model.named_modules():
        host: Any = getattr(module, 'cls_criterion', None)
        if (getattr(module, 'class_weight', None) is not None and
                getattr(host, '__name__', '') == 'cross_entropy' and
                getattr(host, '__module__', '').startswith('mmseg.')):
            module.cls_criterion = WeightedMean(host)
            found.append(name)
    return found
