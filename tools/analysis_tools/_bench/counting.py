"""How many operators a run takes, and how often the host waits in it."""
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from _bench.timing import DEVICE, Row

# They start no kernel: memory is taken, or a question about a tensor answered.
ALLOCATIONS = frozenset({
    'empty', 'empty_like', 'empty_strided', 'new_empty',
    'new_empty_strided', 'empty_permuted'})
QUESTIONS = frozenset({'is_same_size'})
# Views whose schema does not say so.
HIDDEN_VIEWS = frozenset({'_unsafe_view', 'lift_fresh', 'detach', 'alias'})
# Of a warning of torch.cuda.set_sync_debug_mode.
SYNCHRONISES = 'synchronizing CUDA operation'


class Operators(TorchDispatchMode):
    """Counts what is dispatched inside a with block, backward included.

    Views and allocations do not count: they start no kernel.

    Attributes:
        seen: how often each operator was dispatched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.seen.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        if computes(func):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def computes(func: Any) -> bool:
    """Is it more than a view, an allocation, or a question?"""
    space, name = func._schema.name.split('::')
    if space in ('prim', 'profiler') or (
            name in ALLOCATIONS | QUESTIONS | HIDDEN_VIEWS):
        return False
    # What a view returns is its input, unwritten.
    return not any(each.alias_info is not None and
                   not each.alias_info.is_write
                   for each in func._schema.returns)


def operators_of(run: Callable[[], None]) -> int:
    """In one run; it should have run before."""
    with Operators() as operators:
        run()
    return operators.total


def synchronisations_of(run: Callable[[], None]) -> int | None:
    """How often the host waits for the GPU in one run; None on the CPU."""
    if DEVICE != 'cuda':
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(SYNCHRONISES in str(each.message) for each in caught)


def counts(run: Callable[[], None]) -> Row:
    """Two columns of a table; the second is empty on the CPU."""
    waits = synchronisations_of(run)
    return {'operators': operators_of(run),
            'host syncs': '' if waits is None else waits}
