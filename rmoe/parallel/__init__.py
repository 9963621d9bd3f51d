"""Training on many processes: parameters and experts spread over them.

What is in here knows the layer (rmoe.moe), which does not know it.
"""
from rmoe.parallel.sharded import FullySharded

__all__ = ['FullySharded']
