"""Access to torchvision's operators, with an error that says what is wrong
with them."""
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def load() -> Any:
    """``torch.ops.torchvision``.

    Raises:
        ImportError: if torchvision is missing or was built for another torch.
    """
    try:
        # Importing torchvision registers its operators. It hides an error in
        # doing so, but the next line then raises one.
        import torchvision
        torch.ops.torchvision.nms  # noqa: B018
    except Exception as error:  # a torchvision of another torch can raise any
        raise ImportError(
            "rmoe stands in for mmcv's operators with torchvision's, and "
            f'torchvision does not work beside torch {torch.__version__} '
            f'({type(error).__name__}: {error}). Install the torchvision '
            'that belongs to it; python tools/doctor.py says how') from error
    assert torchvision
    return torch.ops.torchvision


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it has that type, because
    torchvision's kernels do not support bfloat16 and, on the CPU, float16."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
