"""torchvision's operators, or what is wrong with them."""
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def load() -> Any:
    """``torch.ops.torchvision``.

    Raises:
        ImportError: if torchvision is missing or of another torch.
    """
    try:
        # Registers the operators; torchvision.ops alone would not say so.
        import torchvision
        torch.ops.torchvision.nms  # noqa: B018
    except Exception as error:  # of another torch it can raise anything
        raise ImportError(
            "rmoe stands in for mmcv's operators with torchvision's, and "
            f'torchvision does not work beside torch {torch.__version__} '
            f'({type(error).__name__}: {error}). Install the torchvision '
            'that belongs to it: python tools/doctor.py') from error
    assert torchvision
    return torch.ops.torchvision


def exact(tensor: Tensor) -> Tensor:
    """At least float32: torchvision's kernels know no bfloat16, and on the
    CPU no float16."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
