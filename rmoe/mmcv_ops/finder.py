"""Where Python finds ``mmcv._ext`` if mmcv itself has none."""
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
    """Finds the stand-in when nothing else found ``mmcv._ext``.

    Python asks its finders in order. This one comes last, so compiled
    operators, or another library's stand-in, are always found before it.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == EXTENSION:
            return spec_from_file_location(fullname, STAND_IN)
        return None


def install() -> None:
    """Let ``import mmcv._ext`` fall back on the stand-in; once is enough."""
    if not any(isinstance(finder, ExtensionFinder)
               for finder in sys.meta_path):
        sys.meta_path.append(ExtensionFinder())
