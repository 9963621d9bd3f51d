"""Functions for models in wrappers such as DDP: they find the model inside,
and make a new wrapper when other parameters are to train.

DDP decides when it is built which parameters it synchronises. So a model must
be wrapped again when ``requires_grad`` of its parameters changes. FSDP2
(torch's ``fully_shard``) reads ``requires_grad`` in every pass, and needs no
new wrapper.
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
    """Raise for a wrapper that would overwrite the load counters of one rank
    by those of another.

    Args:
        model: the model of the runner, in its wrapper.

    Raises:
        ValueError: for DDP with ``broadcast_buffers=True``, its default.
    """
    # A wrapper such as MMSeparateDistributedDataParallel wraps the children of
    # a model, and only these have the attribute.
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and getattr(
                module, 'broadcast_buffers', False):
            raise ValueError(f'{type(module).__name__}: {BUFFERS}')


def check_saving(runner: Runner) -> None:
    """Raise for a checkpoint hook that would save only rank 0's part of a
    sharded model.

    Raises:
        ValueError: names the hook and the fix.
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
    """Raise for a model wrapper under which parameters cannot be frozen or
    unfrozen during training.

    Raises:
        ValueError: names the wrapper and the fix.
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
    """Put the runner's model into a new DDP wrapper, if it is in one.

    If ``train_step`` is compiled, it is compiled again. A communication hook
    of the old wrapper is registered on the new one, unless the constructor of
    the wrapper has already done so.

    Raises:
        ValueError: if a new wrapper cannot be made, or the communication hook
            cannot be moved to it; names the wrapper or the hook.
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
    """The communication hook of a DDP wrapper.

    Returns:
        Its name, and its function and state or None: older versions of torch
        do not keep them, and no version keeps those of its built-in hooks.
        None if there is no communication hook.
    """
    name = model._get_ddp_logging_data().get('comm_hook')
    parts = getattr(model, '_comm_hooks', ())
    return (name, parts[0] if parts else None) if name else None


def _register(model: DistributedDataParallel, name: str,
              parts: tuple[Any, Any] | None) -> None:
    # Such a hook can be moved only if its state is a process group or None. A
    # state of another kind may refer to the gradient buckets of the old
    # wrapper.
    if parts is None or not isinstance(parts[1],
                                       (ProcessGroup, type(None))):
        raise ValueError(
            f'the communication hook {name} was registered on a '
            f'{type(model).__name__}. ResidualMoEHook builds a new one at '
            'every stage, and cannot move the hook to it: register the hook '
            'in the constructor of a wrapper that model_wrapper_cfg names')
    model.register_comm_hook(parts[1], parts[0])
