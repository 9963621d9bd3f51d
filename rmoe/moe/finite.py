"""Finds tokens with nan or inf in a model, once for all layers and ranks.

On an accelerator, or with several ranks, a router counts such tokens instead
of raising at once (see :class:`rmoe.moe.routers.base.Router`). MoELossHook
takes the counts from time to time and raises.
"""
import torch
from torch import nn

from rmoe.moe.layer import moe_layers
from rmoe.moe.routers.base import not_finite


def take_not_finite(model: nn.Module) -> torch.Tensor:
    """Return the counts of tokens with nan or inf, and set them to zero.

    Returns:
        (L,) int64, such tokens at the router of each of the L MoE layers
        since the last call. The tensor stays on the device of the model, and
        the call does not wait for that device.
    """
    counts = [layer.router.not_finite
              for layer in moe_layers(model).values()]
    taken = torch.stack(counts)
    for count in counts:
        count.zero_()
    return taken


def raise_not_finite(model: nn.Module, counts: torch.Tensor) -> None:
    """Raise an error if there were tokens with nan or inf.

    This reads the counts, once for all layers, and so waits for the device.

    Args:
        model: any module with MoE layers inside.
        counts: (L,) from :func:`take_not_finite`, or (R, L), those of R ranks.

    Raises:
        NotFiniteError: names the first layer with such tokens, and the ranks.
    """
    of_ranks = counts.view(-1, counts.shape[-1]).T.tolist()
    for (key, layer), each in zip(moe_layers(model).items(), of_ranks,
                                  strict=True):
        if any(each):
            ranks = ', '.join(str(r) for r, count in enumerate(each) if count)
            raise not_finite(sum(each), where=layer.name or key,
                             ranks=ranks if len(each) > 1 else '')
