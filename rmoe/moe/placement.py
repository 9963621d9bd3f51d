"""Chooses the FFNs of a model that become MoE FFNs."""
from collections.abc import Mapping
from typing import Any


def choose_blocks(layers: Any, depth: int, option: str = 'moe.layers'
                  ) -> tuple[int, ...]:
    """Return the indices of the MoE blocks of a backbone without stages.

    Args:
        layers: block indices, or one of V-MoE's placements (2106.05974):
            ``dict(every=n)``, every n-th block from block n - 1 on (which
            ends with the last block if n divides ``depth``), or
            ``dict(last=n)``, the last n of the blocks with odd indices.
        depth: number of blocks.
        option: the name of the user's option that holds ``layers``, for the
            message.

    Raises:
        ValueError: for another placement, or more blocks than there are.
    """
    if not isinstance(layers, Mapping):
        return tuple(layers)
    if len(layers) == 1 and (n := layers.get('every')) and 1 <= n <= depth:
        return tuple(range(n - 1, depth, n))
    odd = range(1, depth, 2)
    if len(layers) == 1 and (n := layers.get('last')) and 1 <= n <= len(odd):
        return tuple(odd[-n:])
    raise ValueError(
        f'{option}={dict(layers)} is neither dict(every=n) with n up to '
        f'{depth} blocks, nor dict(last=n) with n up to {len(odd)} odd '
        'blocks, nor a tuple of block indices')
