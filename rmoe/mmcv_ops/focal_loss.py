"""Sigmoid focal loss (1708.02002) of (N, C) logits. The N targets are class
indices, of which C means background."""
import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe.mmcv_ops.torchvision_ops import exact


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor,
                               output: Tensor, gamma: float, alpha: float
                               ) -> None:
    """Write the (N, C) losses to ``output``. ``weight`` has a factor for each
    of the C classes, or is empty."""
    positive, p, log_p, log_not_p = _parts(input, target)
    losses = torch.where(positive, -alpha * (1 - p)**gamma * log_p,
                         -(1 - alpha) * p**gamma * log_not_p)
    output.copy_(_weighted(losses, target, weight))


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor,
                                grad_input: Tensor, gamma: float, alpha: float
                                ) -> None:
    """Write the derivatives of the losses by the logits to ``grad_input``."""
    positive, p, log_p, log_not_p = _parts(input, target)
    gradients = torch.where(
        positive,
        -alpha * (1 - p)**gamma * (1 - p - gamma * p * log_p),
        -(1 - alpha) * p**gamma * (gamma * (1 - p) * log_not_p - p))
    grad_input.copy_(_weighted(gradients, target, weight))


def _parts(input: Tensor, target: Tensor
           ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each logit: whether its class is the target, its probability p,
    log p and log (1 - p)."""
    classes = torch.arange(input.shape[1], device=input.device)
    logits = exact(input)
    return (target[:, None] == classes, logits.sigmoid(),
            F.logsigmoid(logits), F.logsigmoid(-logits))


def _weighted(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return values * weight[target][:, None] if weight.numel() else values
