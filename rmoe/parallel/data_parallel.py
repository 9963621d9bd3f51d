"""Data parallel: each rank has the whole model, gradients are averaged."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
)

from rmoe.registry import MODEL_WRAPPERS, type_name

BUFFERS = ('broadcast_buffers=True copies the counters of rank 0 over those '
           'of the other ranks before each forward pass, so their loads are '
           'never counted: set broadcast_buffers=False in model_wrapper_cfg')


@MODEL_WRAPPERS.register_module()
class DistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper, on GPUs or CPUs, with options for large models.

    On CPUs there is no synchronised batch norm: each rank then normalises by
    its own batch, and says so.

    Args:
        module: the model, on the device where it stays.
        device_ids: the GPU of this process; nothing on a CPU.
        detect_anomalous_params: whether parameters without a gradient are
            logged; slow.
        broadcast_buffers: must be False.
        find_unused_parameters: whether the graph is searched in each
            iteration for parameters that get no gradient. Experts always get
            one.
        static_graph: whether the same parameters get a gradient in each
            iteration. torch then exchanges in the order of the first
            backward pass, and finds unused parameters once. Wrapping the
            model again, as at a switch of stages, starts anew.
        gradient_compression: 'bf16' sends half the bytes: gradients are
            rounded to bfloat16 and averaged in it. Weights, moments and the
            arithmetic of a rank stay as they are.

    Raises:
        ValueError: for an unknown compression, one that the backend cannot
            average, or broadcast_buffers=True.
    """

    def __init__(self,
                 module: nn.Module,
                 device_ids: Sequence[int] | None = None,
                 detect_anomalous_params: bool = False,
                 broadcast_buffers: bool = False,
                 find_unused_parameters: bool = False,
                 static_graph: bool = False,
                 gradient_compression: str | None = None) -> None:
        if broadcast_buffers:
            raise ValueError(BUFFERS)
        if gradient_compression not in (None, 'bf16'):
            raise ValueError(f'gradient_compression={gradient_compression!r} '
                             "must be None or 'bf16'")
        device = next(module.parameters()).device
        if device.type == 'cpu':
            device_ids = None
            module = without_synchronised_norms(module)
        if gradient_compression:
            _check_bfloat16(device)
        super().__init__(
            module, detect_anomalous_params, device_ids=device_ids,
            broadcast_buffers=False, static_graph=static_graph,
            find_unused_parameters=find_unused_parameters)
        if gradient_compression:
            self.register_comm_hook(None, bf16_compress_hook)
        self._learns_graph = static_graph

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without exchanging them.

        torch learns a static graph from a first backward pass that does
        exchange, or fails. What was averaged once stays as it is.
        """
        if self._learns_graph:
            self._learns_graph = False
            yield
        else:
            with super().no_sync():
                yield


def without_synchronised_norms(module: nn.Module) -> nn.Module:
    """A model on CPUs, where torch has no synchronised batch norm, with
    norms of their own instead; the same parameters and buffers."""
    if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        print_log('SyncBN works on GPUs alone: each rank normalises by its '
                  'own batch', 'current')
    return revert_sync_batchnorm(module)


def _check_bfloat16(device: torch.device) -> None:
    """All ranks try it, or the first backward pass fails."""
    try:
        distributed.all_reduce(torch.ones(
            1, dtype=torch.bfloat16, device=device))
    except RuntimeError as error:
        raise ValueError(
            "gradient_compression='bf16': the backend "
            f'{distributed.get_backend()} of torch {torch.__version__} cannot '
            f'average bfloat16 on {device.type} ({error}). Leave it out, or '
            'use a newer torch') from error


def choose_wrapper(cfg: Config) -> None:
    """Give a distributed run its wrapper, where the config names none.

    One that the config names stays, with settings that suit a
    mixture-of-experts model and CPUs where it leaves them open.

    Raises:
        ValueError: if a data-parallel wrapper is to broadcast buffers, or a
            sharded model to be compiled.
    """
    default: dict[str, Any] = dict(
        type='rmoe.DistributedDataParallel',
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    wrapper = cfg.get('model_wrapper_cfg')
    if wrapper is None or not wrapper.get('type'):
        cfg.model_wrapper_cfg = {**default, **(wrapper or {})}
        wrapper = cfg.model_wrapper_cfg
    kind = wrapper['type']
    if type_name(wrapper) == 'FullySharded' and cfg.get('compile'):
        raise ValueError('compile=True does not work with rmoe.FullySharded, '
                         'which gathers parameters while the model runs: '
                         'leave one of the two out')
    if isinstance(kind, str):
        kind = MODEL_WRAPPERS.get(kind)
    if kind is not None and issubclass(kind,
                                       nn.parallel.DistributedDataParallel):
        if wrapper.setdefault('broadcast_buffers', False):
            raise ValueError(f'{type_name(wrapper)}: {BUFFERS}')
        if not torch.cuda.is_available():
            wrapper.setdefault('device_ids', None)
