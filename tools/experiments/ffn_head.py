"""The decode head of the variants 'head-*' of the plan 'recipe'."""
from typing import Any

from mmcv.cnn.bricks.transformer import FFN
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class FFNHead(FCNHead):
    """A FCNHead with a FFN between its convolutions and its classifier.

    The FFN treats each position of the feature map by itself, as in a
    transformer block: y = x + FFN(LayerNorm(x)).

    Args:
        channels: width of the head and of the FFN, whose hidden layer is four
            times as wide.
        fcn: all other arguments of mmseg's FCNHead.
    """

    def __init__(self, channels: int, **fcn: Any) -> None:
        super().__init__(channels=channels, **fcn)
        self.norm = nn.LayerNorm(channels)
        self.ffn = FFN(channels, 4 * channels, act_cfg=dict(type='GELU'))

    def _forward_feature(self, inputs: list[Tensor]) -> Tensor:
        maps_BCHW = super()._forward_feature(inputs)
        x_BTC = maps_BCHW.flatten(2).mT
        y_BTC = self.ffn(self.norm(x_BTC), identity=x_BTC)
        return y_BTC.mT.unflatten(2, maps_BCHW.shape[2:])
