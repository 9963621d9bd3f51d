"""What an upcycled model does: how its experts are used, and how far it is
from the model it was made of."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe import moe_layers


@torch.no_grad()
def measure_loads(model: nn.Module, images: Sequence[Tensor]
                  ) -> dict[str, Tensor]:
    """(E,) tokens that each expert of each MoE layer takes."""
    loads: dict[str, Tensor] = {}

    def counter(name: str) -> Any:
        def count(router: nn.Module, args: tuple, routing: Any) -> None:
            loads[name] = loads.get(name, 0) + routing.load_E

        return count

    handles = [layer.router.register_forward_hook(counter(name))
               for name, layer in moe_layers(model).items()]
    try:
        for image in images:
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return loads


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module,
                       images: Sequence[Tensor]) -> dict[str, float]:
    """Between the feature maps of two backbones: the largest absolute one,
    and the norm of all over the norm of the first's."""
    largest = squares = total = 0.
    for image in images:
        for a, b in zip(one(image), other(image), strict=True):
            largest = max(largest, float((a - b).abs().max()))
            squares += float((a - b).square().sum())
            total += float(a.square().sum())
    return dict(largest=largest, relative=(squares / total)**0.5)


def layers_that_change_the_function(model: nn.Module) -> str:
    """Why upcycling alone changes the model in its present mode, even with
    zero residuals; empty if it does not."""
    kinds: dict[str, int] = {}
    for layer in moe_layers(model).values():
        if not layer.preserves_function:
            kind = (f'{type(layer.router).__name__} with align='
                    f'{layer.align!r}, unrouted={layer.unrouted!r}, '
                    f'core={layer.experts.core}')
            kinds[kind] = kinds.get(kind, 0) + 1
    return '; '.join(f'{count} MoE layers are {kind}'
                     for kind, count in kinds.items())
