"""What can be wrong with data, config and checkpoint, found before training;
importing it registers a hook."""
# ruff: noqa: E402
from rmoe.needs import need

need('mmengine', 'mmcv')

from rmoe.checks.label_check_hook import LabelCheckHook

__all__ = ['LabelCheckHook']
