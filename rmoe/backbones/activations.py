"""Activations that pretrained weights need."""
import torch
from torch import Tensor, nn

from rmoe.registry import MODELS


@MODELS.register_module()
class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the cheap GELU that CvT was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)
