"""What versions of torch differ in; nothing else in rmoe asks for a version.

Each row of the table is a feature: the torch it came with, where torch has
it, and what stands in before. Features that nothing can stand in for are
asked for by :func:`require`.
"""
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import flop_counter

OLDEST_TORCH = '2.1'


def release(version: str) -> tuple[int, ...]:
    """(2, 14) of '2.14.1+cu130'."""
    return tuple(map(int, re.findall(r'\d+', version)[:2]))


def has_torch(version: str) -> bool:
    """Is this torch of that version or newer?"""
    return release(torch.__version__) >= release(version)


def require(feature: str, version: str) -> None:
    """Refuse what this torch is too old for.

    Raises:
        ValueError: that names the feature, the version it needs and this one.
    """
    if not has_torch(version):
        raise ValueError(f'{feature} needs torch >= {version}, this is torch '
                         f'{torch.__version__}')


def _is_autocast_enabled(device: str) -> bool:
    return (torch.is_autocast_cpu_enabled() if device == 'cpu'
            else torch.is_autocast_enabled())


def _get_autocast_dtype(device: str) -> torch.dtype:
    return (torch.get_autocast_cpu_dtype() if device == 'cpu'
            else torch.get_autocast_gpu_dtype())


def _register_flop_formula(operator: Any) -> Callable[[Callable], Callable]:
    def register(formula: Callable[..., int]) -> Callable[..., int]:
        flop_counter.flop_mapping[operator] = formula
        return formula

    return register


def _since(version: str, new: Callable[[], Any], old: Any) -> Any:
    return new() if has_torch(version) else old


is_compiling: Callable[[], bool] = _since(
    '2.3', lambda: torch.compiler.is_compiling, torch._utils.is_compiling)

is_autocast_enabled: Callable[[str], bool] = _since(
    '2.4', lambda: torch.is_autocast_enabled, _is_autocast_enabled)

get_autocast_dtype: Callable[[str], torch.dtype] = _since(
    '2.4', lambda: torch.get_autocast_dtype, _get_autocast_dtype)

register_flop_formula: Callable[[Any], Callable[[Callable], Callable]] = (
    _since('2.2', lambda: flop_counter.register_flop_formula,
           _register_flop_formula))

# Attention on the CPU: forward and backward operators that torch's counter of
# operations does not know. Before, the CPU ran those that it knows.
cpu_attention: tuple[Any, ...] = _since(
    '2.2', lambda: (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward),
    ())

# One kernel for the products of all experts; None: a loop over experts.
grouped_mm: Callable[..., Tensor] | None = _since(
    '2.10', lambda: F.grouped_mm, None)
