"""What a step sends, and how long links take for it."""
from collections.abc import Sequence
from dataclasses import dataclass

from _plan.layouts import Group, Layout, Unit

# Of a count of rows.
INT32 = 4


@dataclass(frozen=True)
class Links:
    """What a GPU can send.

    Attributes:
        inside: bytes a second, of each GPU to others of its node.
        between: bytes a second out of a node, all its GPUs together.
        node: GPUs in a node.
    """
    inside: float
    between: float
    node: int

    def seconds(self, sent: float, group: Group) -> float:
        """Of a ring in which each process sends so many bytes.

        Members of a ring in one node pass on to each other, and one of them
        out of the node; all rings of a node share its way out.
        """
        if group.size == 1:
            return 0.
        members = self._members(group)
        times = [sent / self.inside] if members > 1 else []
        if group.size > members:
            times.append(sent * self.node / members / self.between)
        return max(times)

    def exchange_seconds(self, sent: float, group: Group) -> float:
        """Of an all-to-all in which each process sends so many bytes, equal
        shares to all others."""
        if group.size == 1:
            return 0.
        members = self._members(group)
        others = group.size - 1
        return max(sent * (members - 1) / others / self.inside,
                   sent * (group.size - members) / others * self.node
                   / self.between)

    def _members(self, group: Group) -> int:
        """Of the group in one node."""
        return max(min(group.size, self.node // group.stride), 1)


@dataclass(frozen=True)
class Rows:
    """What a MoE layer exchanges.

    Attributes:
        count: rows of a process.
        width: D.
        experts: E.
        recomputed: whether backward repeats the forward exchange.
    """
    count: int
    width: int
    experts: int
    recomputed: bool


@dataclass(frozen=True)
class Traffic:
    """Of one process in one step.

    Attributes:
        parameters: bytes sent for parameters and gradients.
        rows: bytes sent for rows of tokens.
        seconds: of all transfers one after the other.
    """
    parameters: int
    rows: int
    seconds: float


def share(size: int) -> float:
    """Of a tensor, what each process sends while it is gathered, or
    scattered."""
    return (size - 1) / size


def traffic(units: Sequence[Unit], layout: Layout, rows: Sequence[Rows],
            world_size: int, bfloat16: bool, reshard: bool, links: Links
            ) -> Traffic:
    """Of one step.

    Args:
        units: of the model in this layout.
        layout: how it is spread.
        rows: of each MoE layer.
        world_size: W.
        bfloat16: whether rows travel in bfloat16.
        reshard: whether units are gathered again for backward.
        links: their speeds.
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
    """What a process sends of one layer's rows: there and back in forward, and
    their gradients back and there in backward.

    Args:
        layer: whose rows.
        parts: N processes that share its experts.
        bfloat16: whether rows are of that type.
    """
    passes = 6 if layer.recomputed else 4
    size = layer.count * layer.width * (2 if bfloat16 else 4)
    counts = layer.experts * INT32 * (2 if layer.recomputed else 1)
    return share(parts) * (passes * size + counts)
