"""An import finder that finds ``mmcv._ext`` if mmcv itself has none."""
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

EXTENSION = 'mmcv._ext'
STAND_IN = Path(__file__).with_name('extension.py')


class ExtensionFinder(MetaPathFinder):
    """Finds the stand-in if no other finder has found ``mmcv._ext``.

    Python asks its finders in order. This one is the last, so that compiled
    operators or the stand-in of another library are always found first.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == EXTENSION:
            return spec_from_file_location(fullname, STAND_IN)
        return None


def install() -> None:
    """Let ``import mmcv._ext`` fall back on the stand-in. More than one call
    has no further effect."""
    if not any(isinstance(finder, ExtensionFinder)
               for finder in sys.meta_path):
        sys.meta_path.append(ExtensionFinder())
