"""Computes where parameters, gradients and optimizer states are in each layout.

Of W processes, S share one copy of the parameters, and N share one set of
experts. Processes with neighbouring ranks share first, because they are in the
same node.
"""
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from _plan.model import REST, WHOLE, Parameter
from rmoe.parallel.units import divisible_dimension

FLOAT32 = 4
BFLOAT16 = 2


@dataclass(frozen=True)
class Layout:
    """One way to spread a model over processes.

    Attributes:
        name: the name in the table.
        shard: S; 1 if every process has all parameters, except experts.
        experts: N; 1 if experts are not divided.
        ddp: whether it is PyTorch's DistributedDataParallel, which keeps a
            second copy of gradients.
        wrapper: the arguments in ``model_wrapper_cfg``; None for the default
            wrapper.
    """
    name: str
    shard: int
    experts: int
    ddp: bool = False
    wrapper: str | None = None


@dataclass(frozen=True)
class Group:
    """The processes that take part in a collective operation.

    Attributes:
        size: the number of processes.
        stride: the difference between neighbouring ranks in the group.
    """
    size: int
    stride: int = 1


@dataclass(frozen=True)
class Unit:
    """The parameters that are gathered together, with their bytes in each
    process of a group.

    Attributes:
        name: the name of its module, or REST or WHOLE.
        block: the name of the block that contains it.
        gathered: bytes of its whole parameters, in the type in which they
            compute.
        gradients: bytes of its whole gradients, in that type.
        reduced: bytes of its whole gradients, in the type in which they are
            summed.
        shards: the processes that share one copy of it.
        copies: the processes that have the same part of it.
    """
    name: str
    block: str
    gathered: int
    gradients: int
    reduced: int
    shards: Group
    copies: Group


@dataclass(frozen=True)
class Memory:
    """The bytes in the process that needs most.

    Attributes:
        weights, gradients, moments: bytes of its own part of these.
        gathered: bytes of parameters and gradients while they are whole, or
            of DDP's buckets.
        activations: bytes that are kept for backward.
    """
    weights: int
    gradients: int
    moments: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return (self.weights + self.gradients + self.moments + self.gathered
                + self.activations)


def layouts(world_size: int, node: int, experts: int) -> list[Layout]:
    """List the layouts to compare, the simplest first.

    Args:
        world_size: W.
        node: number of processes in a node.
        experts: N for the layouts that divide experts. With 1 there are no
            such layouts.
    """
    found = [Layout('data parallel', 1, 1, ddp=True),
             Layout('sharded', world_size, 1, wrapper='')]
    if world_size > node:
        found.append(Layout('sharded in nodes', node, 1,
                            wrapper=f'shard={node}'))
    if experts > 1:
        ours = f'expert_parallel={experts}'
        found.append(Layout('expert parallel', 1, experts,
                            wrapper=f'shard=1, {ours}'))
        found.append(Layout('both', world_size, experts, wrapper=ours))
        if world_size > node and node % experts == 0:
            found.append(Layout('both in nodes', node, experts,
                                wrapper=f'shard={node}, {ours}'))
    return found


def groups(layout: Layout, world_size: int, parameter: Parameter
           ) -> tuple[Group, Group]:
    """The processes that share one copy of a parameter, and those that have
    the same part of it."""
    shard, parts = layout.shard, layout.experts
    if parameter.unit == WHOLE:
        return Group(1), Group(world_size)
    if not parameter.experts or parts == 1:
        return Group(shard), Group(world_size // shard, shard)
    if shard == 1:
        return Group(1), Group(world_size // parts, parts)
    return Group(shard // parts, parts), Group(world_size // shard, shard)


def local_numel(parameter: Parameter, layout: Layout, world_size: int) -> int:
    """The number of elements of a parameter in the process that has most of
    them.

    A parameter is cut along dimension 0 into equal parts, of which the last
    ones may be shorter or empty. Stacked experts are cut along the first
    dimension that can be divided without remainder.
    """
    shape = list(parameter.shape)
    parts = groups(layout, world_size, parameter)[0].size
    divided = parameter.experts and layout.experts > 1
    if divided:
        shape[0] //= layout.experts
    cut = divisible_dimension(shape, parts, int(divided)) if (
        parameter.experts) else None
    if shape:
        shape[cut or 0] = ceil(shape[cut or 0] / parts)
    return prod(shape)


def units(parameters: Sequence[Parameter], layout: Layout, world_size: int,
          bfloat16: bool) -> list[Unit]:
    """The units of a model: first the rest, which is in no block, if there is
    any, then the others in the order of the model."""
    members: dict[str, list[Parameter]] = defaultdict(list, {REST: []})
    for parameter in parameters:
        members[parameter.unit].append(parameter)
    found = []
    for name, inside in members.items():
        if not inside:
            continue
        size = BFLOAT16 if bfloat16 and name not in (REST, WHOLE) else FLOAT32
        # A gathered unit is whole, except that the experts of other processes
        # are not in it.
        parts = layout.experts if inside[0].experts else 1
        count = sum(one.numel for one in inside) // parts
        trained = sum(one.numel for one in inside if one.trains) // parts
        found.append(Unit(
            name, inside[0].block, 0 if name == WHOLE else count * size,
            trained * size, trained * FLOAT32,
            *groups(layout, world_size, inside[0])))
    return found


def memory(parameters: Sequence[Parameter], layout: Layout, world_size: int,
           moments: float, bfloat16: bool, activations: int,
           reshard: bool = True, buckets: bool = True) -> Memory:
    """Compute the memory of the process that needs most.

    Args:
        parameters: the parameters of the model.
        layout: the way in which they are spread.
        world_size: W.
        moments: bytes that the optimizer keeps for each element.
        bfloat16: whether blocks compute in bfloat16.
        activations: bytes that are kept for backward.
        reshard: whether a unit is freed after its forward pass.
        buckets: whether DDP copies gradients into buckets of its own.
    """
    local = {one.name: local_numel(one, layout, world_size)
             for one in parameters}
    trained = FLOAT32 * sum(local[one.name] for one in parameters
                            if one.trains)
    if layout.ddp:
        gathered = trained if buckets else 0
    else:
        gathered = at_once(units(parameters, layout, world_size, bfloat16),
                           reshard)
    return Memory(
        FLOAT32 * sum(local.values()), trained,
        round(moments * sum(local[one.name] for one in parameters
                            if one.trained)), gathered, activations)


def at_once(found: Sequence[Unit], reshard: bool) -> int:
    """The largest number of bytes of whole parameters and gradients, which is
    reached in backward.

    The rest, which is in no block, is whole from its first use to the end of
    backward. Of the blocks, the one that computes is whole, with its experts,
    and so is the next unit, because its gathering has begun. The gradients of
    a unit are whole, in memory of their own, until they are summed. All this
    also holds for a single process, which makes a copy when it gathers.
    """
    held, last = 0, 0
    blocks: dict[str, list[Unit]] = defaultdict(list)
    for unit in found:
        if unit.name == REST:
            held += unit.gathered + unit.gradients
        if unit.name in (REST, WHOLE):
            last += unit.reduced
        else:
            blocks[unit.block].append(unit)
    others = [unit for block in blocks.values() for unit in block]
    if reshard:
        params = max(sum(unit.gathered for unit in block)
                     for block in blocks.values())
        params += max(unit.gathered for unit in others)
    else:
        params = sum(unit.gathered for unit in others)
    gradients = max(sum(unit.gradients for unit in block)
                    for block in blocks.values())
    summed = max(unit.reduced for unit in others)
    return held + max(params + gradients + summed, last)
