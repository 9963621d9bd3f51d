"""Sets the precision in which matrix products are computed: float32, TF32 or
bfloat16."""
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from _bench.timing import DEVICE


@dataclass(frozen=True)
class Precision:
    """A precision of products. Parameters always stay in float32.

    Attributes:
        name: its name on the command line.
        dtype: the type of activations.
        tf32: whether float32 products round their factors to TF32.
    """
    name: str
    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = {each.name: each for each in (
    Precision('bf16', torch.bfloat16),
    Precision('tf32', torch.float32, tf32=True),
    Precision('fp32', torch.float32))}
# Only GPUs have TF32, and bfloat16 is slow on most CPUs.
DEFAULTS = tuple(PRECISIONS) if DEVICE == 'cuda' else ('fp32', )
_used = [PRECISIONS[DEFAULTS[0]]]


def now() -> Precision:
    """The precision in use."""
    return _used[-1]


@contextmanager
def use(name: str) -> Iterator[None]:
    """Measure in another precision inside a with block.

    Args:
        name: a key of PRECISIONS.

    Raises:
        ValueError: for TF32 if there is no GPU.
    """
    precision = PRECISIONS[name]
    if precision.tf32 and DEVICE != 'cuda':
        raise ValueError(f'--precision {name} needs a GPU: choose fp32 or '
                         'bf16')
    # By default convolutions use TF32 and matrix products do not, so both are
    # set.
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    _used.append(precision)
    try:
        for backend in backends:
            backend.allow_tf32 = precision.tf32
        yield
    finally:
        _used.pop()
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


def autocast() -> AbstractContextManager:
    """A context of autocast to the type of activations. It does nothing if
    this is float32."""
    dtype = now().dtype
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(DEVICE, dtype)
