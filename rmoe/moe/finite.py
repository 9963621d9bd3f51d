"""Tokens with nan or inf, where nobody may stop at once to look at them."""
import torch
from torch import nn

from rmoe.moe.layer import moe_layers
from rmoe.moe.routers.base import not_finite


def take_not_finite(model: nn.Module) -> torch.Tensor:
    """(L,) int64, tokens with nan or inf at the router of each MoE layer
    since this was last asked; on their device, without waiting for it."""
    counts = [layer.router.not_finite
              for layer in moe_layers(model).values()]
    taken = torch.stack(counts)
    for count in counts:
        count.zero_()
    return taken


def raise_not_finite(model: nn.Module, counts: torch.Tensor) -> None:
    """Raise if there were such tokens; reads the counts, once for all layers.

    Args:
        model: any module with MoE layers inside.
        counts: (L,) from :func:`take_not_finite`, or (R, L) those of R ranks.

    Raises:
        NotFiniteError: that names the first such layer, and the ranks.
    """
    of_ranks = counts.view(-1, counts.shape[-1]).T.tolist()
    for (key, layer), each in zip(moe_layers(model).items(), of_ranks,
                                  strict=True):
        if any(each):
            ranks = ', '.join(str(r) for r, count in enumerate(each) if count)
            raise not_finite(sum(each), where=layer.name or key,
                             ranks=ranks if len(each) > 1 else '')
