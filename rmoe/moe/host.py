"""Decides whether Python may read the values of a tensor.

On an accelerator a read waits for the device. So the layer has two paths: on
the CPU it reads values where that saves work, elsewhere it reads none.
"""
from torch import Tensor

from rmoe import compat

# Tests set this to True to run the accelerator's path on CPU tensors.
force_accelerator = False


def host_may_read(tensor: Tensor) -> bool:
    """Return True if reading a value of this tensor does not wait.

    That is so on the CPU. An accelerator computes asynchronously: whoever
    reads a value waits until the device has computed it, and a CUDA graph
    cannot contain such a read. While a graph is traced, tensors have no
    values yet.
    """
    return (tensor.device.type == 'cpu' and not force_accelerator
            and not compat.is_compiling())
