"""Measures an upcycled model: the loads of its experts, and how much its
features differ from those of the model that it was made of."""
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rmoe.moe import moe_layers
from rmoe.moe.recording import record_routing


@torch.no_grad()
def measure_loads(model: nn.Module, images: Iterable[Tensor]
                  ) -> dict[str, Tensor]:
    """Run images through a model and count the tokens of its experts.

    Returns:
        For each MoE layer, the (E,) numbers of tokens that its experts got.
    """
    loads: dict[str, Tensor] = {}
    with record_routing(model) as records:
        for image in images:
            model(image)
            for name, routings in records.items():
                for routing in routings:
                    loads[name] = loads.get(name, 0) + routing.load_E
                # The routings of many images would fill the memory.
                routings.clear()
    return loads


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module,
                       images: Sequence[Tensor]) -> dict[str, float]:
    """Compare the feature maps of two backbones.

    Returns:
        ``largest``, the largest absolute difference of two values, and
        ``relative``, the norm of all differences divided by the norm of the
        feature maps of the first backbone.
    """
    largest = squares = total = 0.
    for image in images:
        for a, b in zip(one(image), other(image), strict=True):
            largest = max(largest, float((a - b).abs().max()))
            squares += float((a - b).square().sum())
            total += float(a.square().sum())
    return dict(largest=largest, relative=(squares / total)**0.5)


def layers_that_change_the_function(model: nn.Module) -> str:
    """Find the MoE layers that do not compute the dense function in the
    present mode of the model, even while their residuals are zero.

    Returns:
        A text with the options of these layers; empty if there are none.
    """
    kinds: dict[str, int] = {}
    for layer in moe_layers(model).values():
        if not layer.preserves_function:
            kind = (f'{type(layer.router).__name__} with align='
                    f'{layer.align!r}, unrouted={layer.unrouted!r}, '
                    f'core={layer.experts.core}')
            kinds[kind] = kinds.get(kind, 0) + 1
    return '; '.join(f'{count} MoE layers are {kind}'
                     for kind, count in kinds.items())
