"""Work of which all ranks end well, or none."""
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mmengine.dist import all_gather_object, get_rank

T = TypeVar('T')


class RaisedElsewhere(Exception):
    """The cause of an error that this rank raises because another rank met
    it; the other rank tells it."""

    def __init__(self, rank: int) -> None:
        super().__init__(f'rank {rank} met this error')


@contextmanager
def fail_together() -> Iterator[None]:
    """Ranks leave this context together, and if one fails in it, all fail.

    A rank that raised alone would let the others wait in their next
    collective. Every rank must enter; inside, nothing may wait for another
    rank once one of them can have failed.

    Raises:
        Exception: on all ranks, what was raised on the lowest rank where
            something was. On the others ``__cause__`` is a
            :class:`RaisedElsewhere`.
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
    """Do some work on every rank that ends well on all of them or on none.

    Args:
        work: must not call collectives itself. What it returns travels
            pickled.

    Returns:
        What ``work`` returned on each rank, in their order.

    Raises:
        Exception: see :func:`fail_together`.
    """
    with fail_together():
        value = work()
    return all_gather_object(value)


def _as_sent(error: Exception | None) -> Exception | None:
    """The error, or a RuntimeError that says the same where an error of its
    class cannot be made from a pickle."""
    if error is None:
        return None
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f'{type(error).__name__}: {error}')

