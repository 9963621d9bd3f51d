"""Records what the routers of a model decide while it runs."""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rmoe.moe.layer import moe_layers
from rmoe.moe.routing import Routing, SoftRouting


@contextmanager
def record_routing(model: nn.Module
                   ) -> Iterator[dict[str, list[Routing | SoftRouting]]]:
    """Keep every routing of every MoE layer while the context lasts.

    Yields:
        The routings of each layer, by its name, in the order of its calls.
    """
    records: dict[str, list[Routing | SoftRouting]] = {}
    handles = []
    for name, layer in moe_layers(model).items():
        routings = records[name] = []
        handles.append(layer.router.register_forward_hook(
            lambda module, args, routing, to=routings: to.append(routing)))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
