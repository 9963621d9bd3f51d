"""Which FFNs of a model become MoE FFNs."""
from collections.abc import Mapping
from typing import Any


def choose_blocks(layers: Any, depth: int, option: str = 'moe.layers'
                  ) -> tuple[int, ...]:
    """Which blocks of a backbone without stages are MoE.

    Args:
        layers: block indices, or V-MoE's placements (2106.05974):
            ``dict(every=n)``, each n-th block ending with the last, or
            ``dict(last=n)``, the last n of the odd blocks.
        depth: blocks there are.
        option: what the user calls ``layers``.

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
