"""Upcycling of any PyTorch model, without OpenMMLab (docs/anywhere.md)."""
from rmoe.anywhere.adapters import load_adapter, save_adapter
from rmoe.anywhere.in_place import UpcycleReport, to_dense, upcycle
from rmoe.anywhere.losses import auxiliary_loss
from rmoe.anywhere.stages import set_stage
from rmoe.anywhere.statistics import LayerStats, routing_stats

__all__ = ['LayerStats', 'UpcycleReport', 'auxiliary_loss', 'load_adapter',
           'routing_stats', 'save_adapter', 'set_stage', 'to_dense',
           'upcycle']
