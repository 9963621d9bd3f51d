"""Weights belong to an activation, and no shape would tell."""
from typing import Any

from torch import nn

from rmoe.moe import MoELayer


def check_activation(ffn: Any, kind: str, setting: str,
                     approximate: str = 'none') -> None:
    """Has a model's FFN the activation that a file's weights were trained
    with? With another features are off by 1e-3 to 1e-1.

    Args:
        ffn: the model's first, mmcv's FFN or a MoEFFN.
        kind: class of the activation.
        setting: what to write where it is another.
        approximate: that of nn.GELU.

    Raises:
        ValueError: if not.
    """
    act: nn.Module = (ffn.experts.act if isinstance(ffn, MoELayer)
                      else ffn.layers[0][1])
    if type(act).__name__ != kind or getattr(
            act, 'approximate', approximate) != approximate:
        raise ValueError(f'these weights were trained with {kind}, the model '
                         f'has {act}: set act_cfg={setting}')
