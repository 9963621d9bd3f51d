"""Record what the routers of a model decide while it runs."""
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from rmoe.moe import Routing, SoftRouting, moe_layers


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
    experts = routing.strongest_expert().cpu().numpy()
    return experts.reshape(_map_size(routing.num_tokens, image_hw))


def _map_size(num_tokens: int, image_hw: tuple[int, int]) -> tuple[int, int]:
    height, width = image_hw
    while height * width > num_tokens:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != num_tokens:
        raise ValueError(f'{num_tokens} tokens are no feature map of one '
                         f'{image_hw[0]}x{image_hw[1]} image')
    return height, width
