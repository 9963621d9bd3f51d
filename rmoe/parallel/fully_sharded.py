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

    Each process keeps a part of every parameter. The parameters of a block
    are gathered from all processes when the block computes, and freed after
    it. Experts are gathered separately, so that a stage that runs no experts
    gathers none. After wrapping, parameters are DTensors of their global
    shape. Weights are initialised here, before they are divided.

    Args:
        module: a segmentor, detector or classifier with MoE layers.
        shard: number of processes that share one copy of the parameters. It
            must divide the number of all processes; None means all. With
            fewer there are several copies (HSDP: ``shard=8`` gathers only
            inside machines of 8 GPUs); with 1 each process has a copy.
        expert_parallel: number of processes among which the experts of a
            layer are divided; tokens are sent to the process that has their
            expert. 1 divides no experts. The number of experts must be a
            multiple of it.
        param_dtype: 'bfloat16' gathers blocks in bfloat16 and computes them
            under bfloat16 autocast. The weights that the optimizer updates,
            sums of gradients over processes, routers, norms and everything
            outside of blocks stay in float32.
        reshard_after_forward: False keeps gathered parameters until the
            backward pass, which takes more memory and less communication.

    Attributes:
        module: the model.

    Raises:
        ValueError: for a model without MoE layers, an unknown
            ``param_dtype``, numbers that do not divide each other, or a torch
            older than 2.8.
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
        # Without this class mmengine would initialise the weights again,
        # after it has wrapped the model.
        kind = type(module)
        module.__class__ = type(kind.__name__, (_Initialised, kind), {})
        self._ready = False
        self._reshard_after_forward = reshard_after_forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper
                   ) -> dict[str, Tensor]:
        """Run a training step as mmengine does, but clip gradients by their
        norm over all processes.

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
                        'parameters of which some are divided among processes '
                        'and others kept whole (scalars and, with '
                        'param_dtype, norms and routers): leave this option '
                        'out')

    def val_step(self, data: Any) -> list:
        """Run a validation step with all parameters :meth:`gathered`."""
        with self.gathered():
            return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        """Run a test step with all parameters :meth:`gathered`."""
        with self.gathered():
            return self.module.test_step(data)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather all parameters in every process while the context lasts.

        Inside, no process waits for another. So they may run forward passes
        unequally often, as sliding windows and test-time augmentation need.
        Entering the context is a collective call. It is for forward passes
        without gradients.
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
    """Mix-in that hides ``init_weights`` of a model whose weights are divided:
    they are initialised already, and no process has all of them."""

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
                f'expert_parallel={expert_parallel} does not work with '
                f'{name}: the experts of a {type(layer).__name__} look at the '
                'hidden rows of neighbouring tokens, which may be in another '
                'process. Leave it at 1, which still shards the experts')
