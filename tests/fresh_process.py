"""What mmengine keeps for a whole process, in which many tests run."""
from collections.abc import Iterator

from mmengine.utils import ManagerMixin


def forget() -> None:
    """Remove the loggers, visualizers, message hubs and default scopes of
    earlier runs, as if a new process began. Otherwise a run would write into
    the work dir of an earlier one."""
    for kind in _subclasses(ManagerMixin):
        kind._instance_dict.clear()


def _subclasses(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        yield kind
        yield from _subclasses(kind)
