"""Training in many processes: data parallel, sharded and expert parallel.

Each process has a whole model, a part of every parameter, or some of the
experts. This package uses the MoE layer (rmoe.moe), which does not import it.
Importing the package registers its model wrappers.
"""
from rmoe.parallel.data_parallel import DistributedDataParallel
from rmoe.parallel.fully_sharded import FullySharded

__all__ = ['DistributedDataParallel', 'FullySharded']
