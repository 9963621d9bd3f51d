"""Training by many processes: whole models, parts of them, or experts each.

What is in here knows the layer (rmoe.moe), which does not know it. Importing
it registers the model wrappers.
"""
from rmoe.parallel.data_parallel import DistributedDataParallel
from rmoe.parallel.fully_sharded import FullySharded

__all__ = ['DistributedDataParallel', 'FullySharded']
