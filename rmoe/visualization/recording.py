"""Record what the routers of a model decide while it runs."""
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from rmoe.moe import Routing, SoftRouting, moe_layers

# Of feature maps; 14, DINOv2's, only where no other one fits.
STRIDES = (1, 2, 4, 8, 16, 32, 64, 14)


@contextmanager
def record_routing(model: nn.Module
                   ) -> Iterator[dict[str, list[Routing | SoftRouting]]]:
    """Inside the block, every routing of every MoE layer is kept.

    Yields:
        For each layer's name, its routings in the order of the calls.
    """
    records: dict[str, list[Routing | SoftRouting]] = {}
    handles = []
    for name, layer in moe_layers(model).items():
        routings = records[name] = []
        handles.append(layer.router.register_forward_hook(
            lambda module, args, routing, to=routings: to.append(routing)))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def load_shares(routings: list[Routing | SoftRouting]) -> np.ndarray:
    """(E,) each expert's share of what was served."""
    counts = torch.stack([routing.load_E for routing in routings]).sum(0)
    return (counts / counts.sum().clamp_min(1)).cpu().numpy()


def expert_map(routing: Routing | SoftRouting,
               image_hw: tuple[int, int]) -> np.ndarray:
    """(h, w) the expert with the largest gate of each patch of one image;
    -1 where no expert kept the patch.

    Args:
        routing: of a layer that saw one image.
        image_hw: size of the image the backbone got, padding included.

    Raises:
        ValueError: if the tokens are no feature map of that image.
    """
    leading, height, width, _ = token_map(routing.num_tokens, image_hw)
    experts = routing.strongest_expert().cpu().numpy()
    return experts[leading:].reshape(height, width)


def token_map(num_tokens: int, image_hw: tuple[int, int]
              ) -> tuple[int, int, int, int]:
    """Where the tokens of one image lie.

    Args:
        num_tokens: T.
        image_hw: size of the image the backbone got, padding included.

    Returns:
        Class tokens before those of the map (0 or 1), the map's height and
        width in tokens, and its stride in pixels.

    Raises:
        ValueError: if the tokens are no feature map of that image.
    """
    for stride in STRIDES:
        height, width = (-(-side // stride) for side in image_hw)
        leading = num_tokens - height * width
        if leading in (0, 1):
            return leading, height, width, stride
    raise ValueError(f'{num_tokens} tokens are no feature map of one '
                     f'{image_hw[0]}x{image_hw[1]} image')
