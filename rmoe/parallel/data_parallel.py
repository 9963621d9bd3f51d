"""Data parallel training: each rank has the whole model, and gradients are
averaged over the ranks."""
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

    torch has no synchronised batch norm on CPUs. There each rank normalises
    by the statistics of its own batch, and a message in the log says so.

    Args:
        module: the model, on the device where it stays.
        device_ids: the GPU of this process; ignored on a CPU.
        detect_anomalous_params: whether parameters without a gradient are
            logged, which is slow.
        broadcast_buffers: must be False, because the buffers of a MoE layer
            count the load of one rank.
        find_unused_parameters: whether the graph is searched in each
            iteration for parameters that get no gradient. Experts always get
            one.
        static_graph: whether torch may assume that the same parameters get a
            gradient in each iteration. It then exchanges gradients in the
            order of the first backward pass, and looks for unused parameters
            only once. When the model is wrapped again, as at a switch of
            stages, torch learns both again.
        gradient_compression: 'bf16' sends half the bytes: gradients are
            rounded to bfloat16 and averaged in it. The weights, the moments
            of the optimizer and the arithmetic of a rank stay as they are.

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

        With ``static_graph`` the first backward pass exchanges them all the
        same, because torch learns the graph from it and fails otherwise. This
        does not change the result: gradients that were averaged are equal on
        all ranks, and the next average leaves them as they are.
        """
        if self._learns_graph:
            self._learns_graph = False
            yield
        else:
            with super().no_sync():
                yield


def without_synchronised_norms(module: nn.Module) -> nn.Module:
    """The model with ordinary batch norms in the place of synchronised ones,
    which torch does not have on CPUs. Parameters and buffers are the same."""
    if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        print_log('SyncBN works on GPUs alone: on CPUs each rank normalises '
                  'by the statistics of its own batch', 'current')
    return revert_sync_batchnorm(module)


def _check_bfloat16(device: torch.device) -> None:
    """Raise if the backend cannot average bfloat16, by a trial on all ranks.
    The first backward pass would fail otherwise."""
    try:
        distributed.all_reduce(torch.ones(
            1, dtype=torch.bfloat16, device=device))
    except RuntimeError as error:
        raise ValueError(
            "gradient_compression='bf16': the backend "
            f'{distributed.get_backend()} of torch {torch.__version__} cannot '
            f'average bfloat16 on {device.type} ({error}). Leave '
            'gradient_compression out, or use a newer torch') from error


def choose_wrapper(cfg: Config) -> None:
    """Complete ``model_wrapper_cfg`` in the config of a distributed run.

    If the config names no wrapper, it gets :class:`DistributedDataParallel`.
    A wrapper that it names is kept. Settings that it leaves open get values
    that suit a mixture-of-experts model, and CPUs.

    Raises:
        ValueError: if the config asks a data-parallel wrapper to broadcast
            buffers, or asks to compile a sharded model.
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
