"""Measures the time of a MoE layer in inference, and how much of it is saved by
dropping tokens."""
from collections.abc import Sequence

import torch
from torch import Tensor

from _bench.ceilings import probe_of
from _bench.counting import counts
from _bench.layers import Size, benchmark_layers, moe_layer
from _bench.limit import work_of_ffn
from _bench.passes import FORWARD, step
from _bench.timing import DEVICE, Row, interleave
from rmoe.moe import MoEFFN

# On the CPU, the sizes of the MoE layers of Swin-T at 512x512 with batch 2, and
# one with more tokens.
SIZES: tuple[Size, ...] = (
    (8192, 384, 8), (65536, 1024, 32)) if DEVICE == 'cuda' else (
    (2048, 384, 8), (512, 768, 8), (8192, 384, 8))
CAPACITIES = (0.25, 0.5, 0.75, 1.)


def benchmark_folded(repeats: int, sizes: Sequence[Size] = SIZES
                     ) -> list[Row]:
    """Time of MoE layers with folded experts, with routing, over the dense
    FFN."""
    return benchmark_layers(repeats, sizes, ('no core', ), (FORWARD, ))


def benchmark_capacity(repeats: int, images: int = 2,
                       sizes: Sequence[Size] = SIZES,
                       capacities: Sequence[float] = CAPACITIES
                       ) -> list[Row]:
    """Time of batch-prioritised routing at small capacities over that at
    capacity 1, where dropped tokens get nothing. Beside it is the limit of
    the machine for a FFN on the tokens that are kept, over the same time."""
    rows = []
    for tokens, dim, experts in sizes:
        x = torch.randn(images, tokens // images, dim, device=DEVICE)
        probe = probe_of(tokens, dim, 4 * dim, experts)
        for kind, core in (('folded', False), ('core + residual', True)):
            layers = {capacity: moe_layer(
                dim, experts, core=core, unrouted='zero',
                router=dict(type='TokenChoiceRouter', priority='bpr',
                            eval_capacity_factor=capacity))
                for capacity in (*capacities, 1.)}
            # With the same weights all layers route the tokens alike.
            for layer in layers.values():
                layer.load_state_dict(layers[1.].state_dict())
            steps = {capacity: step(layer, x, FORWARD)
                     for capacity, layer in layers.items()}
            seconds = interleave(steps | probe.steps(), repeats)
            rates = probe.rates(seconds, FORWARD)
            for capacity in capacities:
                kept = tokens_kept(layers[capacity], x)
                limit = work_of_ffn(kept, dim, 4 * dim, FORWARD, experts,
                                    core).seconds(rates)
                rows.append({
                    'T': tokens, 'images': images, 'D': dim, 'E': experts,
                    'layer': kind, 'capacity': capacity,
                    'tokens kept': round(kept / tokens, 3),
                    'ms': round(1e3 * seconds[capacity], 2),
                    'over capacity 1': round(
                        seconds[capacity] / seconds[1.], 3),
                    'limit over capacity 1': round(limit / seconds[1.], 3),
                    **counts(steps[capacity])})
    return rows


@torch.no_grad()
def tokens_kept(layer: MoEFFN, x_BTD: Tensor) -> int:
    routing = layer.router.eval()(x_BTD.flatten(0, 1), None, len(x_BTD))
    return int(routing.counts_E.sum())
