"""Compatibility with older versions of torch.

This is the only module of rmoe that asks which version of torch is installed.
Each entry of its table is a feature: the version that introduced it, the
function that torch has for it since then, and a replacement for older
versions. Features without a replacement are listed in ``NEEDS``; code that
uses one calls :func:`require` first.
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
# Features without a replacement, and the oldest torch that each works with.
NEEDS = {
    'compile=True': '2.6',
    'rmoe.FullySharded': '2.8',
    'CheckpointHook(sharded=True)': '2.6',
    'export by torch.export or to ONNX': '2.11',
}


def release(version: str) -> tuple[int, ...]:
    """Major and minor version, such as (2, 14) for '2.14.1+cu130'."""
    return tuple(map(int, re.findall(r'\d+', version)[:2]))


def has_torch(version: str) -> bool:
    """Whether the installed torch is this version or a newer one."""
    return release(torch.__version__) >= release(version)


def require(feature: str) -> None:
    """Raise if the installed torch is too old for a feature of ``NEEDS``.

    Raises:
        ValueError: names the feature, the version that it needs and the
            version that is installed.
    """
    if not has_torch(NEEDS[feature]):
        raise ValueError(f'{feature} needs torch >= {NEEDS[feature]}, this is '
                         f'torch {torch.__version__}: install a newer torch, '
                         'or do without this feature')


if not has_torch(OLDEST_TORCH):
    # This is no ImportError, because mmengine would catch that and only say
    # that rmoe has no registry.
    raise RuntimeError(
        f'rmoe needs torch >= {OLDEST_TORCH}, this is torch '
        f"{torch.__version__}. Run: python -m pip install 'torch>=2.1' "
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
    # A newer torch may have a formula of its own for this operator, and
    # registering a second one is an error.
    return None if operator in flop_counter.flop_registry else operator


def in_backward() -> bool:
    """Whether a backward pass is running.

    A forward pass that runs inside of a backward pass is one that activation
    checkpointing repeats. torch's own checkpointing asks the same private
    function, from version 2.1 to the newest. While a model is traced the
    result is False, because tracing repeats no forward pass.
    """
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def _since(version: str, new: Callable[[], Any], old: Any) -> Any:
    return new() if has_torch(version) else old


# Each feature: the version of torch that introduced it, what torch has since
# then, and the replacement for older versions.

is_compiling: Callable[[], bool] = _since(
    '2.3', lambda: torch.compiler.is_compiling, torch._utils.is_compiling)

# True while torch.export records the graph, which the ONNX export uses too.
is_exporting: Callable[[], bool] = _since(
    '2.7', lambda: torch.compiler.is_exporting, is_compiling)

is_autocast_enabled: Callable[[str], bool] = _since(
    '2.4', lambda: torch.is_autocast_enabled, _is_autocast_enabled)

get_autocast_dtype: Callable[[str], torch.dtype] = _since(
    '2.4', lambda: torch.get_autocast_dtype, _get_autocast_dtype)

register_flop_formula: Callable[[Any], Callable[[Callable], Callable]] = (
    _since('2.5', lambda: flop_counter.register_flop_formula,
           _register_flop_formula))

# Takes a module and a hook. Before the module loads a state dict, the hook is
# called as hook(module, state_dict, prefix, ...).
register_load_hook: Callable[[nn.Module, Callable[..., None]], Any] = _since(
    '2.5', lambda: nn.Module.register_load_state_dict_pre_hook,
    _register_load_hook)

# A context in which attention is computed by plain matrix products.
plain_attention: Callable[[], AbstractContextManager] = _since(
    '2.3', lambda: _plain_attention, _plain_attention_of_backends)

# The time at which a profiled event began, in nanoseconds or, in older
# versions, microseconds.
start_of: Callable[[Any], int] = (
    (lambda event: event.start_ns())
    if hasattr(torch._C._autograd._KinetoEvent, 'start_ns')
    else _start_in_microseconds)

# The forward and backward operators of attention on the CPU that torch's FLOP
# counter does not know. Before 2.3 the CPU ran operators that it knows.
cpu_attention: tuple[Any, ...] = _since(
    '2.3', lambda: (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward),
    ())

# One kernel that multiplies the rows of all experts by their weights. Where it
# is None, these products are computed in blocks of rows instead.
grouped_mm: Callable[..., Tensor] | None = _since(
    '2.10', lambda: F.grouped_mm, None)

# Whether a product of half-precision matrices can be stored in float32, which
# only CUDA offers.
mm_keeps_float32: bool = has_torch('2.8') and torch.version.hip is None

# The operator that grouped_mm runs, if torch's FLOP counter does not know it;
# otherwise None.
grouped_mm_operator: Any = _since('2.10', _uncounted_grouped_mm, None)
