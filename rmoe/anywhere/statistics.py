"""What the experts receive."""
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from rmoe.moe import MoELayer, moe_layers


@dataclass(frozen=True)
class LayerStats:
    """Of one MoE layer, in training passes.

    Attributes:
        load: share of the assignments that asked for each expert.
        entropy: of the load over its maximum; 1 is balanced, 0 one expert.
        dropped: share of assignments dropped for lack of capacity.
        unrouted: share of tokens that no expert kept.
        demand: assignments that were asked for; 0 if nothing was routed.
        kept: those that experts kept.
    """
    load: tuple[float, ...]
    entropy: float
    dropped: float
    unrouted: float
    demand: float
    kept: float

    def dead(self, below: float = 0.01) -> list[int]:
        """Experts that got less than this part of their fair share."""
        limit = below / len(self.load)
        return [expert for expert, share in enumerate(self.load)
                if share <= limit]


def routing_stats(model: nn.Module) -> dict[str, LayerStats]:
    """What the experts received in training since the last call, over all
    ranks.

    Args:
        model: with MoE layers, wrapped or not. Where several processes train,
            all must call.

    Raises:
        ValueError: without MoE layers.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f'{type(model).__name__} has no MoE layer: call '
                         'rmoe.upcycle(model, layers=...) first')
    return {name: _stats(*counts)
            for name, counts in _take_counts(layers).items()}


def normalised_entropy(share_E: Tensor) -> float:
    """Entropy of a distribution over its maximum, in [0, 1]."""
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
    """Demand, kept and token counts of all ranks, on the CPU; zeroes them.

    One reduction of one flat tensor serves all layers.
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
