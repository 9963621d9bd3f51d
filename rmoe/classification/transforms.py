"""Decoding of image files, and transforms of torchvision that make tensors."""
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image
from torch import Tensor, nn


def decode(file: Path | IO[bytes], name: str) -> Image.Image:
    """Read an RGB image from a file.

    Args:
        file: path or open file.
        name: the name of the image in an error.

    Raises:
        ValueError: if the image cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            return image.convert('RGB')
    # Pillow raises a SyntaxError for a broken PNG.
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f'{name} cannot be decoded: {error}') from None


def build_transforms(transforms: Sequence[Mapping[str, Any]]
                     ) -> Callable[[Image.Image], Tensor]:
    """Chain transforms in their order, and end with a tensor.

    Args:
        transforms: dicts with ``type``, the name of a class of
            torchvision.transforms.v2, and its arguments. The first gets a
            PIL image; ``dict(type='PILToTensor')`` makes a uint8 tensor of
            it for those that need one (RandomErasing).

    Returns:
        A function from a PIL image to a tensor (C, H, W), uint8 unless a
        transform made it something else.

    Raises:
        ValueError: for a name that torchvision does not have, or arguments
            that it does not take.
    """
    # Imported here, because segmentors and detectors need no torchvision.
    from torchvision.transforms import v2
    built = [_build(transform) for transform in transforms]
    return v2.Compose([*built, v2.PILToTensor()])


def _build(transform: Mapping[str, Any]) -> nn.Module:
    from torchvision.transforms import v2
    arguments = dict(transform)
    name = arguments.pop('type', None)
    found = getattr(v2, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, v2.Transform)):
        raise ValueError(f'transforms name {name!r}, which is no transform '
                         'of torchvision.transforms.v2')
    try:
        return found(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f'transform {dict(transform)}: {error}') from None
