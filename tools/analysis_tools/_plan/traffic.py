"""Computes how many bytes a step sends, and how long the links take for it."""
from collections.abc import Sequence
from dataclasses import dataclass

from _plan.layouts import Group, Layout, Unit

# The bytes of a number of rows, which processes send before the rows.
INT32 = 4


@dataclass(frozen=True)
class Links:
    """The rates at which GPUs can send.

    Attributes:
        inside: bytes per second that each GPU sends to others of its node.
        between: bytes per second that leave a node, for all its GPUs together.
        node: number of GPUs in a node.
    """
    inside: float
    between: float
    node: int

    def seconds(self, sent: float, group: Group) -> float:
        """The time of a ring in which each process sends ``sent`` bytes.

        The members of a ring in one node send to each other, and one of them
        sends to the next node. All rings of a node share the links that leave
        it.
        """
        if group.size == 1:
            return 0.
        members = self._members(group)
        times = [sent / self.inside] if members > 1 else []
        if group.size > members:
            times.append(sent * self.node / members / self.between)
        return max(times)

    def exchange_seconds(self, sent: float, group: Group) -> float:
        """The time of an all-to-all in which each process sends ``sent``
        bytes, in equal shares to all others."""
        if group.size == 1:
            return 0.
        members = self._members(group)
        others = group.size - 1
        return max(sent * (members - 1) / others / self.inside,
                   sent * (group.size - members) / others * self.node
                   / self.between)

    def _members(self, group: Group) -> int:
        """The number of processes of a group that are in one node."""
        return max(min(group.size, self.node // group.stride), 1)


@dataclass(frozen=True)
class Rows:
    """The rows that a MoE layer exchanges between processes.

    Attributes:
        count: number of rows of a process.
        width: D.
        experts: E.
        recomputed: whether the exchange of the forward pass is repeated in
            backward.
    """
    count: int
    width: int
    experts: int
    recomputed: bool


@dataclass(frozen=True)
class Traffic:
    """The bytes that one process sends in one step.

    Attributes:
        parameters: bytes for parameters and gradients.
        rows: bytes for rows of tokens.
        seconds: the time of all transfers one after the other.
    """
    parameters: int
    rows: int
    seconds: float


def share(size: int) -> float:
    """The share of a tensor that each process sends when the tensor is
    gathered or scattered among ``size`` processes."""
    return (size - 1) / size


def traffic(units: Sequence[Unit], layout: Layout, rows: Sequence[Rows],
            world_size: int, bfloat16: bool, reshard: bool, links: Links
            ) -> Traffic:
    """Compute what one process sends in one step.

    Args:
        units: the units of the model in this layout.
        layout: the way in which the model is spread.
        rows: the rows of each MoE layer.
        world_size: W.
        bfloat16: whether rows are sent in bfloat16.
        reshard: whether units are gathered again for backward.
        links: the rates of the links.
    """
    sent, seconds = 0., 0.
    if layout.ddp:
        everybody = Group(world_size)
        sent = 2 * share(world_size) * sum(unit.reduced for unit in units)
        return Traffic(round(sent), 0, links.seconds(sent, everybody))
    for unit in units:
        times = 2 if reshard else 1
        inside = share(unit.shards.size) * (
            times * unit.gathered + unit.reduced)
        across = 2 * share(unit.copies.size) * (
            unit.reduced / unit.shards.size)
        sent += inside + across
        seconds += links.seconds(inside, unit.shards) + links.seconds(
            across, unit.copies)
    travelled = sum(row_bytes(layer, layout.experts, bfloat16)
                    for layer in rows)
    seconds += links.exchange_seconds(travelled, Group(layout.experts))
    return Traffic(round(sent), round(travelled), seconds)


def row_bytes(layer: Rows, parts: int, bfloat16: bool) -> float:
    """The bytes that a process sends for the rows of one layer. In forward,
    rows are sent to their experts and the outputs are sent back. In backward,
    the gradients take both ways in the opposite direction.

    Args:
        layer: the rows of the layer.
        parts: N, the number of processes that share its experts.
        bfloat16: whether rows are sent in bfloat16.
    """
    passes = 6 if layer.recomputed else 4
    size = layer.count * layer.width * (2 if bfloat16 else 4)
    counts = layer.experts * INT32 * (2 if layer.recomputed else 1)
    return share(parts) * (passes * size + counts)
