"""Recording of what the routers of a model decide while it runs, and maps of
it."""
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from rmoe.moe import Routing, SoftRouting, moe_layers

# Strides of feature maps. 14, that of DINOv2, is tried only if no other fits.
STRIDES = (1, 2, 4, 8, 16, 32, 64, 14)


@contextmanager
def record_routing(model: nn.Module
                   ) -> Iterator[dict[str, list[Routing | SoftRouting]]]:
    """Keep every routing of every MoE layer while the context lasts.

    Yields:
        The routings of each layer, by its name, in the order of its calls.
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
    """(E,) the share of all served rows that each expert served."""
    counts = torch.stack([routing.load_E for routing in routings]).sum(0)
    return (counts / counts.sum().clamp_min(1)).cpu().numpy()


def expert_map(routing: Routing | SoftRouting,
               image_hw: tuple[int, int]) -> np.ndarray:
    """For each patch (h, w) of an image, the expert that has the largest gate;
    -1 where no expert kept the patch.

    Args:
        routing: the routing of a layer that saw one image.
        image_hw: size of the image the backbone got, padding included.

    Raises:
        ValueError: if the tokens do not form a feature map of that image.
    """
    leading, height, width, _ = token_map(routing.num_tokens, image_hw)
    experts = routing.strongest_expert().cpu().numpy()
    return experts[leading:].reshape(height, width)


def token_map(num_tokens: int, image_hw: tuple[int, int]
              ) -> tuple[int, int, int, int]:
    """Find the feature map that the tokens of one image form.

    Args:
        num_tokens: T.
        image_hw: size of the image the backbone got, padding included.

    Returns:
        The number of class tokens before those of the map (0 or 1), the map's
        height and width in tokens, and its stride in pixels.

    Raises:
        ValueError: if the tokens do not form a feature map of that image.
    """
    for stride in STRIDES:
        height, width = (-(-side // stride) for side in image_hw)
        leading = num_tokens - height * width
        if leading in (0, 1):
            return leading, height, width, stride
    raise ValueError(f'{num_tokens} tokens are no feature map of one '
                     f'{image_hw[0]}x{image_hw[1]} image at any of the usual '
                     'strides: only layers that see one whole image can be '
                     'drawn')
