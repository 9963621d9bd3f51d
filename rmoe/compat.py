"""What versions of torch differ in; nothing else in rmoe asks for a version.

Each row of the table is a feature: the torch it came with, where torch has
it, and what stands in before. Features that nothing can stand in for are
asked for by :func:`require`.
"""
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import flop_counter

OLDEST_TORCH = '2.1'
# What nothing stands in for, and the torch it needs.
NEEDS = {
    'compile=True': '2.6',
    'rmoe.FullySharded': '2.8',
    'CheckpointHook(sharded=True)': '2.6',
    'export by torch.export or to ONNX': '2.11',
}


def release(version: str) -> tuple[int, ...]:
    """(2, 14) of '2.14.1+cu130'."""
    return tuple(map(int, re.findall(r'\d+', version)[:2]))


def has_torch(version: str) -> bool:
    """Is this torch of that version or newer?"""
    return release(torch.__version__) >= release(version)


def require(feature: str) -> None:
    """Refuse a feature of ``NEEDS`` that this torch is too old for.

    Raises:
        ValueError: that names the feature, the version it needs and this one.
    """
    if not has_torch(NEEDS[feature]):
        raise ValueError(f'{feature} needs torch >= {NEEDS[feature]}, this is '
                         f'torch {torch.__version__}')


if not has_torch(OLDEST_TORCH):
    # mmengine hides an ImportError: it would say that rmoe has no registry.
    raise RuntimeError(
        f'rmoe needs torch >= {OLDEST_TORCH}, this is torch '
        f"{torch.__version__}: python -m pip install 'torch>=2.1' "
        'torchvision; tools/doctor.py says what else does not fit')


def _is_autocast_enabled(device: str) -> bool:
    return (torch.is_autocast_cpu_enabled() if device == 'cpu'
            else torch.is_autocast_enabled())


def _get_autocast_dtype(device: str) -> torch.dtype:
    return (torch.get_autocast_cpu_dtype() if device == 'cpu'
            else torch.get_autocast_gpu_dtype())


def _register_flop_formula(operator: Any) -> Callable[[Callable], Callable]:
    def register(formula: Callable[..., int]) -> Callable[..., int]:
        counter: Any = flop_counter
        if hasattr(counter, 'flop_registry'):  # 2.2 to 2.4
            counter.flop_registry[operator] = counter.shape_wrapper(formula)
        else:
            counter.flop_mapping[operator] = formula
        return formula

    return register


def _register_load_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    module._register_load_state_dict_pre_hook(hook, with_module=True)


def _plain_attention() -> AbstractContextManager:
    return nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)


def _plain_attention_of_backends() -> AbstractContextManager:
    return torch.backends.cuda.sdp_kernel(
        enable_flash=False, enable_math=True, enable_mem_efficient=False)


def _start_in_microseconds(event: Any) -> int:
    return event.start_us()


def _uncounted_grouped_mm() -> Any:
    operator = getattr(torch.ops.aten, '_grouped_mm', None)
    # A newer torch may bring a formula; two are an error.
    return None if operator in flop_counter.flop_registry else operator


def in_backward() -> bool:
    """Whether a backward pass is running, so that a forward pass inside is
    one that an activation checkpoint repeats.

    torch's checkpoints ask the same function from 2.1 to the newest. While a
    model is traced nothing is repeated.
    """
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def _since(version: str, new: Callable[[], Any], old: Any) -> Any:
    return new() if has_torch(version) else old


# feature: since, what torch has, what stands in before

is_compiling: Callable[[], bool] = _since(
    '2.3', lambda: torch.compiler.is_compiling, torch._utils.is_compiling)

# Is torch.export, which ONNX needs too, writing the graph down?
is_exporting: Callable[[], bool] = _since(
    '2.7', lambda: torch.compiler.is_exporting, is_compiling)

is_autocast_enabled: Callable[[str], bool] = _since(
    '2.4', lambda: torch.is_autocast_enabled, _is_autocast_enabled)

get_autocast_dtype: Callable[[str], torch.dtype] = _since(
    '2.4', lambda: torch.get_autocast_dtype, _get_autocast_dtype)

register_flop_formula: Callable[[Any], Callable[[Callable], Callable]] = (
    _since('2.5', lambda: flop_counter.register_flop_formula,
           _register_flop_formula))

# (module, hook), hook(module, state_dict, prefix, ...)
register_load_hook: Callable[[nn.Module, Callable[..., None]], Any] = _since(
    '2.5', lambda: nn.Module.register_load_state_dict_pre_hook,
    _register_load_hook)

# A context in which attention is plain matrix products.
plain_attention: Callable[[], AbstractContextManager] = _since(
    '2.3', lambda: _plain_attention, _plain_attention_of_backends)

# (event) -> when a profiled event began, in a unit of its own.
start_of: Callable[[Any], int] = (
    (lambda event: event.start_ns())
    if hasattr(torch._C._autograd._KinetoEvent, 'start_ns')
    else _start_in_microseconds)

# Attention on the CPU: forward and backward operators that torch's counter of
# operations does not know. Before, the CPU ran those that it knows.
cpu_attention: tuple[Any, ...] = _since(
    '2.3', lambda: (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward),
    ())

# One kernel for the products of all experts; None: blocks of rows.
grouped_mm: Callable[..., Tensor] | None = _since(
    '2.10', lambda: F.grouped_mm, None)

# A product of half-precision matrices that is stored in float32, on CUDA.
mm_keeps_float32: bool = has_torch('2.8') and torch.version.hip is None

# What it runs, where torch's counter of operations does not know that.
grouped_mm_operator: Any = _since('2.10', _uncounted_grouped_mm, None)
