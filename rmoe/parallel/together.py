"""Work that succeeds on all ranks or fails on all of them."""
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mmengine.dist import all_gather_object, get_rank

T = TypeVar('T')


class RaisedElsewhere(Exception):
    """The ``__cause__`` of an error that this rank raises only because another
    rank met it; the other rank reports the error."""

    def __init__(self, rank: int) -> None:
        super().__init__(f'rank {rank} met this error')


@contextmanager
def fail_together() -> Iterator[None]:
    """A context that all ranks leave together; if one rank fails in it, all do.

    If one rank alone raised an error, the others would wait for it in their
    next collective call. Every rank must enter the context. Inside, no rank
    may wait for another one after a point at which one can have failed.

    Raises:
        Exception: on all ranks, the error of the lowest rank that met one. On
            the other ranks its ``__cause__`` is a :class:`RaisedElsewhere`.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    for rank, sent in enumerate(all_gather_object(_as_sent(error))):
        if sent is None:
            continue
        if error is not None and rank == get_rank():
            raise error
        raise sent from RaisedElsewhere(rank)


def together(work: Callable[[], T]) -> list[T]:
    """Call a function on every rank; it succeeds on all ranks or fails on all.

    Args:
        work: the function, which must not call collectives itself. Its result
            is pickled and sent to the other ranks.

    Returns:
        The results of ``work``, in the order of the ranks.

    Raises:
        Exception: see :func:`fail_together`.
    """
    with fail_together():
        value = work()
    return all_gather_object(value)


def _as_sent(error: Exception | None) -> Exception | None:
    """The error, or a RuntimeError with the same text if the error does not
    survive being pickled."""
    if error is None:
        return None
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f'{type(error).__name__}: {error}')

