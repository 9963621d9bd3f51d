"""A check of the activation, which weights depend on although no shape shows
it."""
from typing import Any

from torch import nn

from rmoe.moe import MoELayer


def check_activation(ffn: Any, kind: str, setting: str,
                     approximate: str = 'none') -> None:
    """Check that a model's FFN has the activation that a file's weights were
    trained with. With another one, features would be off by 1e-3 to 1e-1.

    Args:
        ffn: the first FFN of the model, mmcv's FFN or a MoEFFN.
        kind: class name of the activation of the file.
        setting: value of ``act_cfg`` that gives this activation, for the
            error.
        approximate: ``approximate`` of nn.GELU.

    Raises:
        ValueError: if the activation is another one.
    """
    act: nn.Module = (ffn.experts.act if isinstance(ffn, MoELayer)
                      else ffn.layers[0][1])
    if type(act).__name__ != kind or getattr(
            act, 'approximate', approximate) != approximate:
        raise ValueError(f'these weights were trained with {kind}, the model '
                         f'has {act}: set act_cfg={setting}')
