"""Fully sharded training of MoE models inside mmengine's runner."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from rmoe import compat
from rmoe.moe import MoELayer, moe_layers
from rmoe.parallel.data_parallel import without_synchronised_norms
from rmoe.parallel.layout import layout_of
from rmoe.registry import MODEL_WRAPPERS

PARAM_DTYPES = (None, 'bfloat16')


@MODEL_WRAPPERS.register_module()
class FullySharded(nn.Module):
    """A model whose parameters, gradients and optimizer state are divided
    among processes by torch's ``fully_shard`` (FSDP2).

    A block is gathered when it computes and given up after it; experts are
    gathered apart, so that a stage without them gathers none. Parameters are
    DTensors of their global shape afterwards. Weights are initialised here,
    before they are divided.

    Args:
        module: a segmentor, detector or classifier with MoE layers.
        shard: how many processes share one copy of the parameters; a divisor
            of all, None for all. With fewer there are several copies
            (HSDP: ``shard=8`` keeps gathering inside machines of 8 GPUs), with
            1 one in each process.
        expert_parallel: divide the experts of a layer among so many
            processes, to which their rows travel; 1 divides none. The number
            of experts must be a multiple.
        param_dtype: 'bfloat16' gathers blocks in bfloat16, and computes them
            under autocast to it. What the optimizer steps, the sum of
            gradients over processes, routers, norms and all outside blocks
            stay in float32.
        reshard_after_forward: False keeps what was gathered until backward:
            more memory, fewer bytes on their way.

    Attributes:
        module: the model.

    Raises:
        ValueError: for a model without MoE layers, numbers that do not
            divide each other, or a torch older than 2.8.
    """

    def __init__(self, module: nn.Module, shard: int | None = None,
                 expert_parallel: int = 1, param_dtype: str | None = None,
                 reshard_after_forward: bool = True) -> None:
        super().__init__()
        compat.require('rmoe.FullySharded')
        from rmoe.parallel import copies, mesh, sharding, state
        layers = moe_layers(module)
        _check(layers, expert_parallel, param_dtype)
        device = next(module.parameters()).device.type
        meshes = mesh.lay_out(device, dist.get_world_size(), shard,
                              expert_parallel)
        if device == 'cpu':
            module = without_synchronised_norms(module)
        sharding.initialise(module)
        self.module: Any = module
        self._parallel = [
            sharding.divide(layer.experts, meshes)
            for layer in layers.values() if meshes.expert is not None]
        self._units = sharding.shard(module, meshes, param_dtype,
                                     reshard_after_forward)
        state.accept_full_tensors(module)
        copies.allow_copies(module)
        # mmengine would initialise weights after it has wrapped the model.
        kind = type(module)
        module.__class__ = type(kind.__name__, (_Initialised, kind), {})
        self._ready = False
        self._reshard_after_forward = reshard_after_forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper
                   ) -> dict[str, Tensor]:
        """As mmengine's; gradients are clipped by their norm over all
        processes.

        Raises:
            ValueError: for an optimizer that cannot step this model.
        """
        if not self._ready:
            self._prepare(optim_wrapper)
            self._ready = True
        return self.module.train_step(data, optim_wrapper)

    def _prepare(self, optim_wrapper: OptimWrapper) -> None:
        from rmoe.parallel.clipping import clip_grad_norm_
        if getattr(optim_wrapper, 'clip_func', None) is (
                torch.nn.utils.clip_grad_norm_):
            optim_wrapper.clip_func = clip_grad_norm_
        for group in optim_wrapper.param_groups:
            kinds = {layout_of(parameter) is None
                     for parameter in group['params']}
            for option in ('foreach', 'fused'):
                if group.get(option) and len(kinds) > 1:
                    raise ValueError(
                        f'optimizer.{option}=True takes no group of '
                        'parameters of which some are divided and some kept '
                        'whole, as scalars are, and with param_dtype norms '
                        'and routers: leave it out')

    def val_step(self, data: Any) -> list:
        """As mmengine's, see :meth:`gathered`."""
        with self.gathered():
            return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        """As mmengine's, see :meth:`gathered`."""
        with self.gathered():
            return self.module.test_step(data)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All parameters in every process, for forward passes that processes
        make unequally often: sliding windows, test-time augmentation.

        A collective call, without gradient. No process waits for another
        inside.
        """
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            for layer, parallel in self._parallel:
                parallel.gather(layer)
            yield
        finally:
            for _, parallel in self._parallel:
                parallel.release()
            for unit in self._units:
                unit.reshard()
                unit.set_reshard_after_forward(
                    self._reshard_after_forward, recurse=False)


class _Initialised:
    """Mixed into a model whose weights are divided: there is nothing left to
    initialise, and no process could."""

    @property
    def init_weights(self) -> NoReturn:
        raise AttributeError('weights were initialised before they were '
                             'divided among processes')


def _check(layers: dict[str, MoELayer], expert_parallel: int,
           param_dtype: str | None) -> None:
    if param_dtype not in PARAM_DTYPES:
        raise ValueError(
            f'param_dtype={param_dtype!r} is not one of {PARAM_DTYPES}')
    if not layers:
        raise ValueError(
            'FullySharded found no MoE layer in the model: give the backbone '
            'a moe=dict(layers=...), or remove model_wrapper_cfg')
    if expert_parallel == 1:
        return
    for name, layer in layers.items():
        if layer.num_experts % expert_parallel:
            raise ValueError(
                f'expert_parallel={expert_parallel} does not divide the '
                f'{layer.num_experts} experts of {name}: set it to a divisor, '
                'or moe.num_experts to a multiple')
        if layer.needs_all_rows:
            raise ValueError(
                f'expert_parallel={expert_parallel} cannot serve {name}, a '
                f'{type(layer).__name__} that looks at the hidden rows of '
                'neighbouring tokens: leave it at 1, which shards its experts')
