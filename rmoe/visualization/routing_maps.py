"""Maps and shares of recorded routings."""
import numpy as np
import torch

from rmoe.moe import Routing, SoftRouting

# Strides of feature maps. 14, that of DINOv2, is tried only if no other fits.
STRIDES = (1, 2, 4, 8, 16, 32, 64, 14)


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
