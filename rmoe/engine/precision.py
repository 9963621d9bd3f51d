"""Chooses the type and the optimizer wrapper for mixed precision, where a
config or ``--amp`` asks for it."""
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device

from rmoe.engine.amp import gpu_has_bfloat16
from rmoe.registry import type_name

AMP = 'AmpOptimWrapper'
BFLOAT16 = 'rmoe.BFloat16OptimWrapper'
# The devices on which mmengine's AmpOptimWrapper works.
ACCELERATORS = ('cuda', 'npu', 'mlu', 'musa')


def set_precision(cfg: Config, amp: bool) -> str:
    """Set the optimizer wrapper for mixed precision, where --amp or the config
    asks for it.

    Args:
        cfg: the config of a training, which is changed.
        amp: whether --amp was given.

    Returns:
        A line for the log: the type in which the model computes, and why.
        Empty without mixed precision.

    Raises:
        ValueError: if --amp was given and the optimizer wrapper is neither
            OptimWrapper nor one for mixed precision.
    """
    wrapper = cfg.optim_wrapper
    kind = type_name(wrapper) or 'OptimWrapper'
    if kind == 'BFloat16OptimWrapper' or not (amp or kind == AMP):
        return ''
    if kind not in (AMP, 'OptimWrapper'):
        raise ValueError('--amp works with optim_wrapper.type='
                         f"'OptimWrapper', the config has {kind!r}. Leave "
                         '--amp out, or change the type')
    device = get_device()
    if device not in ACCELERATORS:
        _compute_in_bfloat16(wrapper)
        return ('mixed precision without a GPU is in bfloat16, with no loss '
                f'scale: {BFLOAT16} takes the place of {AMP}')
    # A config in Python may have torch.float16 instead of 'float16'.
    dtype = str(wrapper.get('dtype') or '').removeprefix('torch.')
    has_bfloat16 = device == 'cuda' and gpu_has_bfloat16()
    if amp and ((not dtype and has_bfloat16) or
                (dtype == 'bfloat16' and kind != AMP)):
        _compute_in_bfloat16(wrapper)
        return ('mixed precision is in bfloat16, with no loss scale: '
                f'{BFLOAT16} takes the place of {kind}')
    why = 'as the config says'
    if kind != AMP:
        wrapper.type = AMP
        wrapper.setdefault('loss_scale', 'dynamic')
        if not dtype:
            why = f'because there is no bfloat16 on this {device} device'
    elif not dtype and has_bfloat16:
        why += '; with --amp it is in bfloat16, in which experts are faster'
    return f'mixed precision is in {dtype or "float16"} by {AMP}, {why}'


def _compute_in_bfloat16(wrapper: ConfigDict) -> None:
    wrapper.type = BFLOAT16
    # These options are for AmpOptimWrapper alone. BFloat16OptimWrapper scales
    # no loss and has only one type.
    for option in ('loss_scale', 'dtype', 'use_fsdp'):
        wrapper.pop(option, None)
