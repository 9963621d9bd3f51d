"""The few lines a current PyTorch needs to run mmengine 0.10."""
from typing import Any

from mmengine.runner.checkpoint import CheckpointLoader

from rmoe.upcycling.formats import read_checkpoint


def load_from_local(filename: str, map_location: Any) -> dict[str, Any]:
    """mmengine's loader of local files, by way of our safe reader.

    torch >= 2.6 refuses what mmengine 0.10 pickles into a checkpoint beside
    its tensors. The reader takes the tensors and plain values and leaves the
    rest out; it also reads .safetensors and says what is wrong with a broken
    file.
    """
    # A resumed optimizer keeps these tensors, and training may write to the
    # file: they must not be views of it.
    return read_checkpoint(filename, map_location, mapped=False)


def apply() -> None:
    """Make mmengine's load_from, resume and init_cfg read safely."""
    CheckpointLoader.register_scheme('', load_from_local, force=True)
