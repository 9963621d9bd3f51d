"""The names that weights have in checkpoints of each architecture, and the
rules that translate them to our names."""
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
