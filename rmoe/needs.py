"""A check for missing packages, whose one error names what to install."""
import sys
from importlib.util import find_spec


def need(*names: str) -> None:
    """Raise unless all these packages can be imported.

    Raises:
        ImportError: names the missing packages, the Python interpreter and the
            command that installs them.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'rmoe needs {" and ".join(missing)}, which {sys.executable} does '
            'not have. tools/doctor.py prints the commands; for the CPU or a '
            'GPU alike: python -m pip install torch torchvision mmengine '
            'mmcv-lite==2.1.0, and mmdet, mmsegmentation or both')
