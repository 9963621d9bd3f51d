"""What must be installed, said in one error that names the command."""
import sys
from importlib.util import find_spec


def need(*names: str) -> None:
    """Refuse to go on without these packages.

    Raises:
        ImportError: that names what is missing, this Python and the remedy.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'rmoe needs {" and ".join(missing)}, which {sys.executable} does '
            'not have. tools/doctor.py prints the commands; for the CPU or a '
            'GPU alike: python -m pip install torch torchvision mmengine '
            'mmcv-lite==2.1.0, and mmdet, mmsegmentation or both')
