"""Whether Python may look at the values of a tensor."""
from torch import Tensor

from rmoe import compat

# Tests set it to run an accelerator's path on CPU tensors.
force_accelerator = False


def host_may_read(tensor: Tensor) -> bool:
    """Is a value of this tensor at hand?

    On the CPU it is. An accelerator computes behind Python's back: to read a
    value is to wait until it has caught up, and no CUDA graph can hold that.
    While a graph is traced there is no value yet.
    """
    return (tensor.device.type == 'cpu' and not force_accelerator
            and not compat.is_compiling())
