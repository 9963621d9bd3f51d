"""Fully sharded training of MoE models inside mmengine's runner."""
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from mmengine.dist import broadcast
from mmengine.model import BaseTTAModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard, distribute_tensor

from rmoe.moe import MoELayer, moe_layers
from rmoe.moe.experts import Experts
from rmoe.parallel.clipping import clip_grad_norm_
from rmoe.parallel.exchange import ExpertParallel
from rmoe.parallel.mesh import Layout, lay_out
from rmoe.parallel.replicated import ReplicatedGradients
from rmoe.parallel.units import blocks_of, divisible_dimension, kept_whole
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
        ValueError: for a model without MoE layers, or numbers that do not
            divide each other.
    """

    def __init__(self, module: nn.Module, shard: int | None = None,
                 expert_parallel: int = 1, param_dtype: str | None = None,
                 reshard_after_forward: bool = True) -> None:
        super().__init__()
        layers = moe_layers(module)
        _check(layers, expert_parallel, param_dtype)
        device = next(module.parameters()).device.type
        layout = lay_out(device, dist.get_world_size(), shard,
                         expert_parallel)
        _initialise(module)
        # The model for test-time augmentation never computes itself.
        inner = module.module if isinstance(module, BaseTTAModel) else module
        self.module = module
        self._parallel = [
            _divide(layer.experts, layout) for layer in layers.values()
            if layout.expert is not None]
        self._units = _shard(inner, layers, layout, param_dtype,
                             reshard_after_forward)
        # mmengine would initialise weights after it has wrapped the model.
        kind = type(module)
        module.__class__ = type(kind.__name__, (_Initialised, kind), {})
        self._reshard_after_forward = reshard_after_forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper
                   ) -> dict[str, Tensor]:
        """As mmengine's; gradients are clipped by their norm over all
        processes."""
        if getattr(optim_wrapper, 'clip_func', None) is (
                torch.nn.utils.clip_grad_norm_):
            optim_wrapper.clip_func = clip_grad_norm_
        return self.module.train_step(data, optim_wrapper)

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


class _Initialised(nn.Module):
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


def _initialise(module: nn.Module) -> None:
    """What mmengine does after wrapping: it would be too late."""
    if not getattr(module, 'is_init', False) and hasattr(
            module, 'init_weights'):
        module.init_weights()
    for tensor in module.state_dict().values():
        broadcast(tensor)


def _divide(experts: Experts, layout: Layout
            ) -> tuple[Experts, ExpertParallel]:
    """Leave to each process its experts."""
    assert layout.expert is not None
    for name, parameter in list(experts.named_parameters(recurse=False)):
        divided = nn.Parameter(
            distribute_tensor(parameter.data, layout.expert, [Shard(0)],
                              src_data_rank=None),
            requires_grad=parameter.requires_grad)
        setattr(experts, name, divided)
    parallel = ExpertParallel(layout.expert, experts.num_experts)
    experts.elsewhere = parallel
    return experts, parallel


def _shard(model: nn.Module, layers: dict[str, MoELayer], layout: Layout,
           param_dtype: str | None, reshard_after_forward: bool
           ) -> list[FSDPModule]:
    """Units from the inside out; the model itself is the last one."""
    units: list[Any] = []
    policy = MixedPrecisionPolicy() if param_dtype is None else (
        MixedPrecisionPolicy(param_dtype=getattr(torch, param_dtype),
                             reduce_dtype=torch.float32,
                             cast_forward_inputs=False))
    blocks = blocks_of(model)
    whole = kept_whole(model, [] if param_dtype is None else blocks)
    trained = [one for one in whole if one.requires_grad]
    if trained:
        ReplicatedGradients(trained)

    def add(module: nn.Module, **options: Any) -> None:
        options = dict(mesh=layout.dense, mp_policy=policy) | options
        units.append(fully_shard(
            module, ignored_params=set(whole),
            reshard_after_forward=reshard_after_forward, **options))

    for block in blocks:
        for layer in moe_layers(block).values():
            add(layer.experts, mesh=layout.experts,
                shard_placement_fn=partial(
                    _placement, layout.experts.size(1),
                    layout.expert is not None))
            if layout.expert is not None:
                # The rows of all processes come to their expert, and its
                # gradient is the mean over all.
                layer.experts.set_gradient_divide_factor(
                    float(dist.get_world_size()))
        add(block)
        if policy.param_dtype is not None:
            _compute_in(block, policy.param_dtype)
    add(model, mp_policy=MixedPrecisionPolicy())
    return units


def _placement(parts: int, divided: bool, parameter: nn.Parameter
               ) -> Shard | None:
    """Along which dimension a stack of experts is sharded: one that comes out
    even, as a short dimension would be padded."""
    dimension = divisible_dimension(parameter.shape, parts, int(divided))
    if dimension is None and divided:
        raise ValueError(
            f'no width of a stack of experts {tuple(parameter.shape)} is a '
            f'multiple of {parts} processes: set shard to expert_parallel')
    return None if dimension is None else Shard(dimension)


def _compute_in(block: nn.Module, dtype: torch.dtype) -> None:
    """Autocast inside a block: its parameters are of that type, and what
    comes in and leaves is not."""
    stacks: list[ExitStack] = []

    def enter(module: nn.Module, args: Any) -> None:
        stacks.append(ExitStack())
        device = next(module.parameters()).device.type
        stacks[-1].enter_context(torch.autocast(device, dtype))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stacks.pop().close()

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave, always_call=True)
