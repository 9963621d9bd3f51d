"""Where parameters and what belongs to them are, in each layout.

W processes, of which S share one copy of the parameters and N one set of
experts; neighbours in rank come together first, as they sit in one node.
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
    """One way to spread a model.

    Attributes:
        name: for the table.
        shard: S; 1 where every process has all but experts.
        experts: N; 1 where experts are not divided.
        ddp: whether it is PyTorch's DistributedDataParallel, which keeps
            gradients a second time.
        wrapper: what ``model_wrapper_cfg`` says; None for the default.
    """
    name: str
    shard: int
    experts: int
    ddp: bool = False
    wrapper: str | None = None


@dataclass(frozen=True)
class Group:
    """Processes of one collective.

    Attributes:
        size: how many.
        stride: by which their ranks differ.
    """
    size: int
    stride: int = 1


@dataclass(frozen=True)
class Unit:
    """What is gathered at once: bytes in each process of a group.

    Attributes:
        name: of its module, or what it is.
        block: the block around it.
        gathered: of its parameters, whole, in the type they compute in.
        gradients: of its gradients, whole, in that type.
        reduced: of its gradients, whole, as they are summed.
        shards: the processes that share one copy.
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
    """Bytes in the process that has most.

    Attributes:
        weights, gradients, moments: of its own part.
        gathered: parameters and gradients that are whole for a while, or
            DDP's buckets.
        activations: kept for backward.
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
    """The simplest first.

    Args:
        world_size: W.
        node: processes in a node.
        experts: N of those that divide experts; 1 for none of them.
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
    """Numbers of a parameter in the process that has most of it.

    It is cut along dimension 0 into equal parts, the last ones shorter or
    empty; stacks of experts along the first that comes out even.
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
    """What there is of the rest first, then in the order of the model."""
    members: dict[str, list[Parameter]] = defaultdict(list, {REST: []})
    for parameter in parameters:
        members[parameter.unit].append(parameter)
    found = []
    for name, inside in members.items():
        if not inside:
            continue
        size = BFLOAT16 if bfloat16 and name not in (REST, WHOLE) else FLOAT32
        # Whole, but for experts that are elsewhere.
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
    """Of the process that has most.

    Args:
        parameters: of the model.
        layout: how they are spread.
        world_size: W.
        moments: bytes an optimizer keeps for each number.
        bfloat16: whether parameters compute in bfloat16.
        activations: bytes.
        reshard: whether a unit is dropped after its forward pass.
        buckets: whether DDP copies gradients into its own memory.
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
    """Bytes of whole parameters and gradients at their most, in backward.

    The rest is whole from the first use to the end of backward. Of blocks the
    one that computes is, with its experts, and of those that follow the next
    unit, whose gathering has begun. Gradients of a unit are whole until they
    are summed, in memory of their own. Even a single process that shares with
    nobody copies what it gathers.
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
