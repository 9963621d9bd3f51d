"""Backbones with experts, for mmseg, mmdet and mmpretrain.

Importing this package registers them in mmengine's registries.
"""
# ruff: noqa: E402
from rmoe.needs import need

need('mmengine', 'mmcv')

from rmoe.backbones.activations import QuickGELU
from rmoe.backbones.cvt_moe import CvTMoE
from rmoe.backbones.feature_pyramid import SimpleFeaturePyramid
from rmoe.backbones.hugging_face import HuggingFaceBackbone
from rmoe.backbones.presets import PRESETS, preset
from rmoe.backbones.swin_moe import SwinMoE
from rmoe.backbones.upcycled import upcycled_backbone
from rmoe.backbones.vit_moe import ViTMoE

__all__ = ['PRESETS', 'CvTMoE', 'HuggingFaceBackbone', 'QuickGELU',
           'SimpleFeaturePyramid', 'SwinMoE', 'ViTMoE', 'preset',
           'upcycled_backbone']
