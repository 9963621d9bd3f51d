"""A backbone without its experts."""
from collections.abc import Mapping
from copy import deepcopy
from typing import Any


def dense_twin(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same backbone without experts.

    Args:
        backbone: config of a backbone with experts.
    """
    if backbone['type'].split('.')[-1] == 'UpcycledBackbone':
        return deepcopy(backbone['backbone'])
    return dict(deepcopy(backbone), moe=None)
