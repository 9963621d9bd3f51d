"""Model wrappers: what is inside, and how what trains may change under them.

DDP decides at its construction which parameters it synchronises. So a model
whose ``requires_grad`` changes is wrapped anew. FSDP2 (torch's
``fully_shard``) reads it at every pass and needs nothing.
"""
import gc
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.model import (
    BaseTTAModel,
    MMSeparateDistributedDataParallel,
    is_model_wrapper,
)
from mmengine.runner import Runner
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from rmoe.parallel.data_parallel import BUFFERS
from rmoe.parallel.layout import is_laid_out


def unwrapped(model: nn.Module) -> Any:
    """The model inside wrappers for parallel training and for test-time
    augmentation."""
    inner: Any = model
    while is_model_wrapper(inner) or isinstance(inner, BaseTTAModel):
        inner = inner.module
    return inner


def check_buffers(model: nn.Module) -> None:
    """Refuse a wrapper that overwrites the counters of ranks.

    Args:
        model: as the runner has it.

    Raises:
        ValueError: for DDP with ``broadcast_buffers=True``, its default.
    """
    # One that wraps children has no such attribute itself.
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and getattr(
                module, 'broadcast_buffers', False):
            raise ValueError(f'{type(module).__name__}: {BUFFERS}')


def check_saving(runner: Runner) -> None:
    """Refuse a hook that would save rank 0's part of a sharded model.

    Raises:
        ValueError: that names the hook and the fix.
    """
    if not is_laid_out(runner.model):
        return
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and not getattr(
                hook, 'saves_all_parts', False):
            raise ValueError(
                f'{type(hook).__name__} of mmengine would save the part of '
                'the first process alone: set default_hooks.checkpoint.type='
                "'rmoe.CheckpointHook'")


def check_wrapper(runner: Runner) -> None:
    """Refuse a wrapper under which what trains cannot change.

    Raises:
        ValueError: that names the wrapper and the fix.
    """
    model = runner.model
    if not is_model_wrapper(model) or is_laid_out(model):
        return
    name = type(model).__name__
    advice = ('leave model_wrapper_cfg out for DDP, or set model_wrapper_cfg='
              "dict(type='rmoe.FullySharded')")
    if not isinstance(model, DistributedDataParallel) or isinstance(
            model, MMSeparateDistributedDataParallel):
        raise ValueError(
            f'ResidualMoEHook cannot change what trains under {name}, which '
            'fixes it when the optimizer is built or wraps parts of the '
            f'model: {advice}')
    if not hasattr(runner, 'wrap_model'):
        raise ValueError(
            f'ResidualMoEHook cannot wrap a model in {name} again under '
            f"{type(runner).__name__}: remove runner_type, and {advice}")


def wrap_again(runner: Runner) -> None:
    """Put the runner's model into a new wrapper, where it needs one.

    A compiled ``train_step`` is compiled again. A communication hook that
    the wrapper's constructor does not register itself is registered again.

    Raises:
        ValueError: for a wrapper or a communication hook that cannot be made
            anew; names it.
    """
    check_wrapper(runner)
    if not isinstance(runner.model, DistributedDataParallel):
        return
    inner = runner.model.module
    hook = _communication_hook(runner.model)
    # The old wrapper's reducer must be gone before the new one puts its
    # hooks on the same parameters.
    runner.model = inner
    gc.collect()
    runner.model = runner.wrap_model(
        runner.cfg.get('model_wrapper_cfg'), inner)
    if hook is not None and _communication_hook(runner.model) is None:
        _register(runner.model, *hook)
    runner._maybe_compile('train_step')


def _communication_hook(model: DistributedDataParallel
                        ) -> tuple[str, tuple[Any, Any] | None] | None:
    """Its name; and function and state, if DDP keeps them: older versions of
    torch do not, and of built-in ones nobody does."""
    name = model._get_ddp_logging_data().get('comm_hook')
    parts = getattr(model, '_comm_hooks', ())
    return (name, parts[0] if parts else None) if name else None


def _register(model: DistributedDataParallel, name: str,
              parts: tuple[Any, Any] | None) -> None:
    # States that are no group of processes may remember the old buckets.
    if parts is None or not isinstance(parts[1],
                                       (ProcessGroup, type(None))):
        raise ValueError(
            f'the communication hook {name} was registered by hand on '
            f'{type(model).__name__}, which ResidualMoEHook makes anew at '
            'every stage, and cannot be moved to the new one: register it in '
            'the constructor of a wrapper that model_wrapper_cfg names')
    model.register_comm_hook(parts[1], parts[0])
