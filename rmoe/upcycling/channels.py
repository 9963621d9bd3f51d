"""Weights of the first convolution, for another number of image channels."""
import torch
from torch import Tensor, nn

RGB = 3


def image_convolution(model: nn.Module) -> str | None:
    """Name of the weight of the convolution that takes the image, which is the
    first convolution of the model; None if it has none."""
    return next((f'{name}.weight' for name, module in model.named_modules()
                 if isinstance(module, nn.Conv2d) and module.groups == 1),
                None)


def adapt_channels(weight: Tensor, channels: int) -> tuple[Tensor, str]:
    """Turn weights for three image channels into weights for another number of
    channels, as timm does.

    For one channel they are summed, so that a grey image gives the same result
    as it gave with three equal channels. For other numbers they are repeated
    (R, G, B, R, ...) and scaled by 3 / channels, so that sums over channels
    keep their size.

    Args:
        weight: (D, 3, height, width), of a floating-point type.
        channels: number of channels of the model's images.

    Returns:
        (D, channels, height, width) in float32 or a more precise type, and a
        sentence for a report that says what was done.

    Raises:
        ValueError: if the weight is not for three channels, because it is then
            unknown which of its channels the new ones are similar to.
    """
    own = weight.shape[1]
    if own != RGB:
        raise ValueError(
            f'{own} image channels in the checkpoint and {channels} in the '
            f'model: only weights for {RGB} channels are adapted to others. '
            f'Set in_channels={own}, or load a checkpoint for {RGB}')
    # Half precision would round the sums and the scaled numbers.
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
