"""Finds mistakes in data, config and checkpoint before training starts.

Importing the package registers LabelCheckHook.
"""
# ruff: noqa: E402
from rmoe.needs import need

need('mmengine', 'mmcv')

from rmoe.checks.label_check_hook import LabelCheckHook

__all__ = ['LabelCheckHook']
