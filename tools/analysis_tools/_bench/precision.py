"""float32, TF32, bfloat16: what products compute in."""
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from _bench.timing import DEVICE


@dataclass(frozen=True)
class Precision:
    """How products are computed; parameters are float32 throughout.

    Attributes:
        name: as on the command line.
        dtype: of activations.
        tf32: whether float32 products round their factors to TF32.
    """
    name: str
    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = {each.name: each for each in (
    Precision('bf16', torch.bfloat16),
    Precision('tf32', torch.float32, tf32=True),
    Precision('fp32', torch.float32))}
# TF32 is a thing of GPUs, and bfloat16 is slow on most CPUs.
DEFAULTS = tuple(PRECISIONS) if DEVICE == 'cuda' else ('fp32', )
_used = [PRECISIONS[DEFAULTS[0]]]


def now() -> Precision:
    """The one that is measured in."""
    return _used[-1]


@contextmanager
def use(name: str) -> Iterator[None]:
    """Measure in another precision inside a with block.

    Args:
        name: of PRECISIONS.

    Raises:
        ValueError: for TF32 where there is no GPU.
    """
    precision = PRECISIONS[name]
    if precision.tf32 and DEVICE != 'cuda':
        raise ValueError(f'--precision {name} needs a GPU: choose fp32 or '
                         'bf16')
    # Convolutions use TF32 by default, products do not.
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
    """To the type of activations; nothing where that is float32."""
    dtype = now().dtype
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(DEVICE, dtype)
