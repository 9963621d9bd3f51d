"""MoE backbones; importing them registers them."""
from rmoe import compat
from rmoe.backbones.swin_moe import SwinMoE
from rmoe.backbones.vit_moe import ViTMoE

compat.apply()

__all__ = ['SwinMoE', 'ViTMoE']
