"""The mixture-of-experts layer: routing, experts, losses."""
from rmoe.moe.experts import Experts
from rmoe.moe.layer import MoEFFN, collect_losses, moe_layers
from rmoe.moe.routers import TokenChoiceRouter
from rmoe.moe.routing import Routing, compute_capacity

__all__ = [
    'Experts', 'MoEFFN', 'Routing', 'TokenChoiceRouter', 'collect_losses',
    'compute_capacity', 'moe_layers'
]
