"""Divides the parameters of a model among processes.

Importing this module needs a torch that has ``fully_shard``.
"""
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from mmengine.dist import broadcast
from mmengine.model import BaseTTAModel
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from rmoe.moe import moe_layers
from rmoe.moe.experts import Experts
from rmoe.parallel.exchange import ExpertParallel
from rmoe.parallel.layout import Layout
from rmoe.parallel.mesh import Meshes
from rmoe.parallel.replicated import ReplicatedGradients
from rmoe.parallel.units import blocks_of, divisible_dimension, kept_whole


def initialise(module: Any) -> None:
    """Initialise the weights of a model, equally in all processes.

    mmengine would initialise them after wrapping, when no process has all of
    them.
    """
    if not getattr(module, 'is_init', False) and hasattr(
            module, 'init_weights'):
        module.init_weights()
    for tensor in module.state_dict().values():
        broadcast(tensor)


def divide(experts: Experts, meshes: Meshes
           ) -> tuple[Experts, ExpertParallel]:
    """Keep in each process only the experts that it serves.

    Args:
        experts: all experts of one layer; changed in place.
        meshes: these must have an ``expert`` mesh.

    Returns:
        The experts, and the object that runs them in their processes.
    """
    assert meshes.expert is not None
    layout = Layout(meshes.expert, (Shard(0), ))
    for name, parameter in list(experts.named_parameters(recurse=False)):
        divided = nn.Parameter(
            layout.cut(parameter.data), requires_grad=parameter.requires_grad)
        setattr(experts, name, divided)
    parallel = ExpertParallel(meshes.expert, experts.num_experts)
    experts.elsewhere = parallel
    return experts, parallel


def shard(model: nn.Module, meshes: Meshes, param_dtype: str | None,
          reshard_after_forward: bool) -> list[FSDPModule]:
    """Shard a model in units. The parameters of a unit are gathered together.

    The units are the experts of each MoE layer, the blocks around them, and
    the model itself with everything else.

    Args:
        model: a model with MoE layers; changed in place.
        meshes: the processes over which the model is sharded.
        param_dtype: the type in which blocks are gathered; None for the type
            that they have.
        reshard_after_forward: whether gathered parameters are freed before
            the backward pass.

    Returns:
        The units from the inside out; the model itself is the last one.
    """
    if isinstance(model, BaseTTAModel):
        # This wrapper runs no computation of its own.
        model = model.module
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

    def add(module: nn.Module, **own: Any) -> None:
        options: dict[str, Any] = dict(mesh=meshes.dense, mp_policy=policy)
        options.update(own)
        units.append(fully_shard(
            module, ignored_params=set(whole),
            reshard_after_forward=reshard_after_forward, **options))

    for block in blocks:
        for layer in moe_layers(block).values():
            add(layer.experts, mesh=meshes.experts,
                shard_placement_fn=partial(
                    _placement, meshes.experts.size(meshes.experts.ndim - 1),
                    meshes.expert is not None))
        add(block)
        if policy.param_dtype is not None:
            _compute_in(block, policy.param_dtype)
    add(model, mp_policy=MixedPrecisionPolicy())
    if meshes.dense.device_type == 'cpu':
        for unit in units:
            # In torch 2.8, gloo computes a sum where a mean is asked for.
            unit.set_force_sum_reduction_for_comms(True)
    return units


def _placement(parts: int, divided: bool, parameter: nn.Parameter
               ) -> Shard | None:
    """The dimension along which a stack of experts is sharded: one that can be
    cut into equal parts, because unequal parts are padded. Without such a
    dimension it is None, and FSDP pads the first one."""
    dimension = divisible_dimension(parameter.shape, parts, int(divided))
    if dimension is None and divided:
        raise ValueError(
            f'no width of a stack of experts {tuple(parameter.shape)} is a '
            f'multiple of {parts} processes: set shard to the value of '
            'expert_parallel')
    return None if dimension is None else Shard(dimension)


def _compute_in(block: nn.Module, dtype: torch.dtype) -> None:
    """Run a block under autocast. Its parameters have that type when they are
    gathered, but its inputs and outputs do not."""
    stacks: list[ExitStack] = []

    def enter(module: nn.Module, args: Any) -> None:
        stacks.append(ExitStack())
        device = next(module.parameters()).device.type
        stacks[-1].enter_context(torch.autocast(device, dtype))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stacks.pop().close()

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave, always_call=True)
