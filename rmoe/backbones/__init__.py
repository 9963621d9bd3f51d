"""MoE backbones; importing them registers them."""
from rmoe import compat
from rmoe.backbones.swin_moe import SwinMoE

compat.apply()

__all__ = ['SwinMoE']
