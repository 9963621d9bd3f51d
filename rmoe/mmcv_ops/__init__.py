"""Replacements for mmcv's compiled operators, for an mmcv that has none.

mmseg and mmdet import ``mmcv._ext``, which mmcv-lite and an mmcv built without
a compiler lack. :mod:`rmoe.mmcv_ops.extension` stands in for it, with
torchvision's operators and plain PyTorch (CPU and CUDA). A table in
docs/environment.md says what replaces which operator.

Python finds this stand-in in one of two ways, and never where mmcv has
operators of its own:

- ``import rmoe`` adds :class:`rmoe.mmcv_ops.finder.ExtensionFinder` behind
  Python's own finders.
- ``python -m rmoe.mmcv_ops add`` writes one line beside mmcv, for programs
  that import mmseg or mmdet before rmoe; ``remove`` takes it away.
"""
