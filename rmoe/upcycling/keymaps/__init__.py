"""What each architecture's checkpoints look like."""
from rmoe.upcycling.keymaps.source import (
    Architecture,
    Source,
    matching,
    rename,
)
from rmoe.upcycling.keymaps.swin import SWIN
from rmoe.upcycling.keymaps.vit import VIT

ARCHITECTURES = (SWIN, VIT)

__all__ = ['ARCHITECTURES', 'SWIN', 'VIT', 'Architecture', 'Source', 'matching',
           'rename']
