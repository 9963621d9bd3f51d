"""Statistics of the load of experts: how many tokens each of them gets."""
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from rmoe.moe import MoELayer, moe_layers


@dataclass(frozen=True)
class LayerStats:
    """Routing statistics of one MoE layer, over training passes.

    An assignment is one token that the router sends to one expert.

    Attributes:
        load: share of all assignments that each expert has, before the
            capacity limit.
        entropy: entropy of the load, divided by its maximum: 1 if the load is
            balanced, 0 if one expert has it all.
        dropped: share of assignments dropped for lack of capacity.
        unrouted: share of tokens that no expert kept.
        demand: number of assignments before the capacity limit; 0 if nothing
            was routed.
        kept: number of assignments that experts kept.
    """
    load: tuple[float, ...]
    entropy: float
    dropped: float
    unrouted: float
    demand: float
    kept: float

    def dead(self, below: float = 0.01) -> list[int]:
        """Indices of the experts whose load is at most ``below`` times their
        fair share."""
        limit = below / len(self.load)
        return [expert for expert, share in enumerate(self.load)
                if share <= limit]


def routing_stats(model: nn.Module) -> dict[str, LayerStats]:
    """The load of the experts in training since the last call, summed over all
    ranks.

    Args:
        model: a model with MoE layers, wrapped or not. Where several processes
            train, all must call this.

    Returns:
        The statistics of each MoE layer, by its name.

    Raises:
        ValueError: if the model has no MoE layer.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f'{type(model).__name__} has no MoE layer: call '
                         'rmoe.upcycle(model, layers=...) first')
    return {name: _stats(*counts)
            for name, counts in _take_counts(layers).items()}


def normalised_entropy(share_E: Tensor) -> float:
    """Entropy of a distribution, divided by its maximum, in [0, 1]."""
    if len(share_E) == 1:
        return 1.0
    return float(torch.special.entr(share_E).sum()) / math.log(len(share_E))


def _stats(demand_E: Tensor, kept_E: Tensor, tokens_2: Tensor) -> LayerStats:
    demand, kept = demand_E.sum(), kept_E.sum()
    share_E = demand_E / demand.clamp_min(1)
    return LayerStats(
        tuple(share_E.tolist()), normalised_entropy(share_E),
        1 - float(kept / demand.clamp_min(1)) if demand else 0.,
        float(tokens_2[1] / tokens_2[0].clamp_min(1)), float(demand),
        float(kept))


def _take_counts(layers: Mapping[str, MoELayer]) -> dict[str, list[Tensor]]:
    """Sum the demand, kept and token counters over all ranks, and set them to
    zero. The sums are on the CPU.

    One reduction of one flat tensor is enough for all layers.
    """
    buffers = {name: [layer.demand_E, layer.kept_E, layer.token_counts]
               for name, layer in layers.items()}
    flat = torch.cat([part for parts in buffers.values() for part in parts])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(flat)
    pieces = iter(flat.cpu().double().split(
        [len(part) for parts in buffers.values() for part in parts]))
    counts = {name: [next(pieces) for _ in parts]
              for name, parts in buffers.items()}
    for parts in buffers.values():
        for part in parts:
            part.zero_()
    return counts
