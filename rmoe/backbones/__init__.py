"""MoE backbones; importing them registers them."""
from rmoe import compat
from rmoe.backbones.activations import QuickGELU
from rmoe.backbones.cvt_moe import CvTMoE
from rmoe.backbones.swin_moe import SwinMoE
from rmoe.backbones.upcycled import upcycled_backbone
from rmoe.backbones.vit_moe import ViTMoE

compat.apply()

__all__ = ['CvTMoE', 'QuickGELU', 'SwinMoE', 'ViTMoE',
           'upcycled_backbone']
