"""Mixture-of-experts layers for vision transformers (docs: README.md).

The package has backbones for OpenMMLab 2.x, and functions that work on any
PyTorch model (:mod:`rmoe.anywhere`, docs/anywhere.md). These functions are
attributes of this module and are imported when they are first used.

``import rmoe`` imports neither torch nor OpenMMLab. It installs an import
finder that supplies operators to an mmcv that was installed without compiled
ones (:mod:`rmoe.mmcv_ops`).
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rmoe.mmcv_ops import finder
from rmoe.needs import need
from rmoe.version import __version__

if TYPE_CHECKING:
    from rmoe.anywhere import (
        auxiliary_loss,
        load_adapter,
        routing_stats,
        save_adapter,
        set_stage,
        to_dense,
        upcycle,
    )

__all__ = ['__version__', 'auxiliary_loss', 'load_adapter', 'routing_stats',
           'save_adapter', 'set_stage', 'to_dense', 'upcycle']

need('torch')
finder.install()


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module('rmoe.anywhere'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
