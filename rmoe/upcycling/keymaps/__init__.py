"""What each architecture's checkpoints look like."""
from rmoe.upcycling.keymaps.cvt import CVT
from rmoe.upcycling.keymaps.refused import explain_refusal
from rmoe.upcycling.keymaps.source import (
    Architecture,
    Source,
    matching,
    rename,
)
from rmoe.upcycling.keymaps.swin import SWIN
from rmoe.upcycling.keymaps.vit import VIT

ARCHITECTURES = (SWIN, CVT, VIT)

__all__ = ['ARCHITECTURES', 'CVT', 'SWIN', 'VIT', 'Architecture', 'Source',
           'explain_refusal', 'matching', 'rename']
