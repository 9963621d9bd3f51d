"""Measures how much time it saves to fold experts for inference, that is, to
store core + residual of each expert as one weight."""
from collections.abc import Sequence
from copy import deepcopy

import torch
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from _bench.layers import Size, moe_layer, spread_load
from _bench.passes import FORWARD, step
from _bench.timing import DEVICE, Row, interleave
from rmoe.backbones import preset
from rmoe.registry import MODELS
from rmoe.upcycling import fold

# The MoE layers of Swin-T on one 512x512 image, and a layer with many tokens.
SIZES: tuple[Size, ...] = ((1024, 384, 8), (256, 768, 8), (8192, 384, 8))
KINDS = {'full rank': None, 'rank 16': 16}


def benchmark_folded_layers(repeats: int, sizes: Sequence[Size] = SIZES
                            ) -> list[Row]:
    """Time of the forward passes of MoE layers, folded over unfolded."""
    rows = []
    for tokens, dim, experts in sizes:
        x = torch.randn(1, tokens, dim, device=DEVICE)
        seconds = _both({kind: moe_layer(dim, experts, rank=rank)
                         for kind, rank in KINDS.items()}, x, repeats)
        rows += [{'T': tokens, 'D': dim, 'E': experts, **row}
                 for row in _rows(seconds)]
    return rows


def benchmark_folded_backbone(repeats: int, name: str, size: int, batch: int
                              ) -> list[Row]:
    """Time of the forward passes of a backbone, folded over unfolded."""
    init_default_scope('mmseg')
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    models = {}
    for kind, rank in KINDS.items():
        config = preset(name)
        config['moe']['rank'] = rank
        models[kind] = MODELS.build(config).to(DEVICE)
        spread_load(models[kind].modules())
    return [{'backbone': name, 'image': size, 'batch': batch, **row}
            for row in _rows(_both(models, x, repeats))]


def _both(models: dict[str, nn.Module], x: Tensor, repeats: int
          ) -> dict[tuple[str, bool], float]:
    """The seconds of each model as it is (False) and folded (True)."""
    steps = {}
    for kind, model in models.items():
        folded = deepcopy(model)
        fold(folded)
        steps[kind, False] = step(model, x, FORWARD)
        steps[kind, True] = step(folded, x, FORWARD)
    return interleave(steps, repeats)


def _rows(seconds: dict[tuple[str, bool], float]) -> list[Row]:
    return [{'residual': kind, 'folded': folded,
             'ms': round(1e3 * value, 2),
             'over unfolded': round(value / seconds[kind, False], 3)}
            for (kind, folded), value in seconds.items()]
