"""Dense checkpoints into MoE models and back."""
from rmoe.upcycling.fit import fit
from rmoe.upcycling.formats import (
    read_checkpoint,
    state_dict_of,
    write_atomically,
    write_checkpoint,
)
from rmoe.upcycling.loading import check_loading, check_prefix
from rmoe.upcycling.noise import add_noise
from rmoe.upcycling.report import Report
from rmoe.upcycling.to_dense import to_dense

__all__ = [
    'Report', 'add_noise', 'check_loading', 'check_prefix', 'fit',
    'read_checkpoint', 'state_dict_of', 'to_dense', 'write_atomically',
    'write_checkpoint'
]
