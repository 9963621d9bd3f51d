"""Dense checkpoints into MoE models and back."""
from rmoe.upcycling.formats import (
                                    read_checkpoint,
                                    state_dict_of,
                                    write_atomically,
                                    write_checkpoint,
)
from rmoe.upcycling.loading import check_loading, check_prefix
from rmoe.upcycling.upcycle import Report, add_noise, fit, to_dense

__all__ = [
    'Report', 'add_noise', 'check_loading', 'check_prefix', 'fit',
    'read_checkpoint', 'state_dict_of', 'to_dense', 'write_atomically',
    'write_checkpoint'
]
