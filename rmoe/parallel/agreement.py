"""What one rank meets, all ranks hear of: none waits for one that has left."""
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.dist import all_gather_object, get_rank


@contextmanager
def together() -> Iterator[None]:
    """Ranks leave this context together, and if one fails, all fail.

    Every rank must enter it. Inside, nothing may wait for another rank once
    one of them can have failed.

    Raises:
        ValueError: on the ranks that did not fail, with the rank that did
            and what it said. That rank raises its own error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    said = all_gather_object(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(said):
        if text is not None:
            raise ValueError(f'rank {rank} failed, and rank {get_rank()} '
                             f'with it: {text}')
