"""What each architecture's checkpoints look like."""
from rmoe.upcycling.keymaps.source import (
    Architecture,
    Source,
    matching,
    rename,
)
from rmoe.upcycling.keymaps.swin import SWIN

ARCHITECTURES = (SWIN, )

__all__ = ['ARCHITECTURES', 'SWIN', 'Architecture', 'Source', 'matching',
           'rename']
