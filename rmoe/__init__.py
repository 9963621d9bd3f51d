"""Mixture-of-experts backbones for OpenMMLab 2.x (docs: README.md).

Importing this imports neither torch nor OpenMMLab. It adds a place where
Python finds operators for an mmcv that has none (:mod:`rmoe.mmcv_ops`).
"""
from rmoe.mmcv_ops import finder
from rmoe.version import __version__

finder.install()

__all__ = ['__version__']
