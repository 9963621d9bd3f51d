"""Mixture-of-experts backbones for OpenMMLab 2.x (docs: README.md).

Importing this imports neither torch nor OpenMMLab. It adds a place where
Python finds operators for an mmcv that has none (:mod:`rmoe.mmcv_ops`).
"""
import sys
from importlib.util import find_spec

from rmoe.mmcv_ops import finder
from rmoe.version import __version__

__all__ = ['__version__']

if _missing := [name for name in ('torch', 'mmengine', 'mmcv')
                if find_spec(name) is None]:
    raise ImportError(
        f'rmoe needs {" and ".join(_missing)}, which {sys.executable} does '
        'not have. tools/doctor.py prints the commands; for the CPU or a '
        'GPU alike: python -m pip install torch torchvision mmengine '
        'mmcv-lite==2.1.0, and mmdet, mmsegmentation or both')

finder.install()
