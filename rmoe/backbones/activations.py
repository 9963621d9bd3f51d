"""Activation functions that pretrained weights need and PyTorch lacks."""
import torch
from torch import Tensor, nn

from rmoe.registry import MODELS


@MODELS.register_module()
class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), a cheap approximation of GELU with which CvT was
    trained."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)
