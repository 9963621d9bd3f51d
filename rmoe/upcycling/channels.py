"""Weights of the convolution that takes the image, for other channels."""
import torch
from torch import Tensor, nn

RGB = 3


def image_convolution(model: nn.Module) -> str | None:
    """Name of the weight of the convolution that takes the image: the first
    that the model has; None if it has none."""
    return next((f'{name}.weight' for name, module in model.named_modules()
                 if isinstance(module, nn.Conv2d) and module.groups == 1),
                None)


def adapt_channels(weight: Tensor, channels: int) -> tuple[Tensor, str]:
    """Weights for three channels, for images of another number, as timm
    does it.

    For one channel they are summed: a grey image gives what it gave as three
    equal channels. For others they are repeated (R, G, B, R, ...) and scaled
    by 3 / channels, so that sums over channels keep their size.

    Args:
        weight: (D, 3, height, width), of a floating-point type.
        channels: of the model's images.

    Returns:
        (D, channels, height, width) in float32 or finer, and what was done,
        for a report.

    Raises:
        ValueError: if the weight is not for three channels; it does not say
            which of them others would be like.
    """
    own = weight.shape[1]
    if own != RGB:
        raise ValueError(
            f'{own} image channels in the checkpoint and {channels} in the '
            f'model: only weights for {RGB} channels are adapted to others. '
            f'Set in_channels={own}, or load a checkpoint for {RGB}')
    # In half precision, sums and scaled numbers would be rounded.
    whole = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if channels == 1:
        adapted, how = whole.sum(1, keepdim=True), 'summed over them'
    else:
        order = [i % RGB for i in range(channels)]
        adapted = whole[:, order] * (RGB / channels)
        how = f'repeated and scaled by {RGB}/{channels}'
    return adapted, (
        f'{RGB} image channels in the checkpoint, {channels} in the model: '
        f'{how}')
