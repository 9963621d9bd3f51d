"""Counts the operators that a run dispatches, and how often the host waits for
the GPU in it."""
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from _bench.timing import DEVICE, Row

# These operators start no kernel: they allocate memory, or answer a question
# about a tensor.
ALLOCATIONS = frozenset({
    'empty', 'empty_like', 'empty_strided', 'new_empty',
    'new_empty_strided', 'empty_permuted'})
QUESTIONS = frozenset({'is_same_size'})
# Operators that return views although their schema does not say so.
HIDDEN_VIEWS = frozenset({'_unsafe_view', 'lift_fresh', 'detach', 'alias'})
# A part of the warning that torch.cuda.set_sync_debug_mode produces.
SYNCHRONISES = 'synchronizing CUDA operation'


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched inside a with block, also those
    of the backward pass.

    Views and allocations do not count, because they start no kernel.

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
    """Whether an operator starts a kernel, which views, allocations and
    questions about a tensor do not."""
    space, name = func._schema.name.split('::')
    if space in ('prim', 'profiler') or (
            name in ALLOCATIONS | QUESTIONS | HIDDEN_VIEWS):
        return False
    # The schema of a view says that the result shares the memory of an input
    # and is not written to.
    return not any(each.alias_info is not None and
                   not each.alias_info.is_write
                   for each in func._schema.returns)


def operators_of(run: Callable[[], None]) -> int:
    """The number of operators in one run. It should have run once before, so
    that operators of a first run do not count."""
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
    """The columns "operators" and "host syncs" of a table. The second is empty
    on the CPU."""
    waits = synchronisations_of(run)
    return {'operators': operators_of(run),
            'host syncs': '' if waits is None else waits}
