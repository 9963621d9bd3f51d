"""Work of which all ranks end well, or none."""
import pickle
from collections.abc import Callable
from typing import TypeVar

from mmengine.dist import all_gather_object, get_rank, get_world_size

T = TypeVar('T')


class RaisedElsewhere(Exception):
    """The cause of an error that this rank raises because another rank met
    it; the other rank tells it."""

    def __init__(self, rank: int) -> None:
        super().__init__(f'rank {rank} met this error')


def together(work: Callable[[], T]) -> list[T]:
    """Do some work on every rank that ends well on all of them or on none.

    A rank that raised alone would let the others wait in their next
    collective.

    Args:
        work: must not call collectives itself. What it returns travels
            pickled.

    Returns:
        What ``work`` returned on each rank, in their order.

    Raises:
        Exception: on all ranks, what it raised on the lowest rank where it
            did. On the others ``__cause__`` is a :class:`RaisedElsewhere`.
    """
    if get_world_size() == 1:
        return [work()]
    value = error = None
    try:
        value = work()
    except Exception as caught:
        error = caught
    found = all_gather_object((value, _as_sent(error)))
    for rank, (_, sent) in enumerate(found):
        if sent is None:
            continue
        if error is not None and rank == get_rank():
            raise error
        raise sent from RaisedElsewhere(rank)
    return [value for value, _ in found]


def _as_sent(error: Exception | None) -> Exception | None:
    """The error, or a RuntimeError that says the same where an error of its
    class cannot be made from a pickle."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f'{type(error).__name__}: {error}')

