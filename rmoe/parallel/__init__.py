"""Several processes; importing it registers the model wrappers."""
from rmoe.parallel.data_parallel import DistributedDataParallel

__all__ = ['DistributedDataParallel']
