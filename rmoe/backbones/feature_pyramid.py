"""A neck that makes a feature pyramid, as dense heads take it, from the one
map of a plain ViT."""
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from rmoe.registry import MODELS


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w) maps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@MODELS.register_module()
class SimpleFeaturePyramid(nn.Module):
    """The neck of ViTDet (2203.16527), which computes every level of the
    pyramid from the backbone's last map.

    Args:
        in_channels: width of the backbone.
        out_channels: width of every level.
        scales: size of each level divided by that of the map; allowed are
            powers of two from 1/2 to 4. With patches of 16 pixels the default
            gives levels with strides from 4 to 32.
        num_outs: number of levels to return. Each level beyond ``scales``
            has half the size of the one before, of which it takes every
            second pixel, as in mmdet's FPN. None means one level for each
            scale.

    Raises:
        ValueError: for another scale, or if ``num_outs`` is less than the
            number of scales.
    """

    def __init__(self, in_channels: int, out_channels: int = 256,
                 scales: Sequence[float] = (4, 2, 1, 0.5),
                 num_outs: int | None = None) -> None:
        super().__init__()
        self.num_outs = len(scales) if num_outs is None else num_outs
        if self.num_outs < len(scales):
            raise ValueError(f'num_outs={num_outs} is less than the '
                             f'{len(scales)} scales, each of which gives a '
                             'level: raise it, or give fewer scales')
        self.levels = nn.ModuleList(
            _level(in_channels, out_channels, scale) for scale in scales)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the pyramid.

        Args:
            inputs: the backbone's maps; only the last, (B, C, h, w), is used.

        Returns:
            (B, out_channels, scale h, scale w) for each scale, and the
            further levels of ``num_outs``.
        """
        outs = [level(inputs[-1]) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


def _level(in_channels: int, out_channels: int, scale: float
           ) -> nn.Sequential:
    """Build the layers of one level: resize the map, then two convolutions
    with norms."""
    half, quarter = in_channels // 2, in_channels // 4
    resize: dict[float, list[nn.Module]] = {
        4: [nn.ConvTranspose2d(in_channels, half, 2, 2), LayerNorm2d(half),
            nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)],
        2: [nn.ConvTranspose2d(in_channels, half, 2, 2)],
        1: [],
        0.5: [nn.MaxPool2d(2, 2)],
    }
    if scale not in resize:
        raise ValueError(f'scale {scale} is not one of {tuple(resize)}')
    widths: dict[float, int] = {4: quarter, 2: half}
    width = widths.get(scale, in_channels)
    return nn.Sequential(
        *resize[scale],
        nn.Conv2d(width, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels))

