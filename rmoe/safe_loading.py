"""mmengine's loaders of checkpoints, reading files instead of running them.

Nothing changes on import. ``rmoe.CheckpointHook`` and the tools install the
loaders for their process, MoE backbones use them for their own ``init_cfg``.
A program of its own that loads files by mmengine's functions, such as mmseg's
``init_model``, calls :func:`install` first.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from rmoe.upcycling.formats import read_checkpoint, without_wrappers
from rmoe.upcycling.formats.weight_sets import WRAPPERS

# (file name, map_location) -> the file's content
Loader = Callable[[str, Any], dict[str, Any]]


def load_from_local(filename: str, map_location: Any) -> dict[str, Any]:
    """mmengine's loader of local files, by way of our safe reader.

    torch >= 2.6 refuses what mmengine 0.10 pickles into a checkpoint beside
    its tensors. The reader takes the tensors and plain values and leaves the
    rest out; it also reads .safetensors and says what is wrong with a broken
    file.
    """
    # A resumed optimizer keeps these tensors, and training may write to the
    # file: they must not be views of it.
    content = read_checkpoint(filename, map_location, mapped=False)
    # mmengine knows DDP's 'module.' alone, not torch.compile's '_orig_mod.'.
    if isinstance(state := content.get('state_dict'), dict) and any(
            WRAPPERS.search(str(key)) for key in state):
        content['state_dict'] = without_wrappers(state)
    return content


def load_from_http(filename: str, map_location: Any = None,
                   local: Loader = load_from_local) -> dict[str, Any]:
    """mmengine's loader of URLs, which would execute what it downloads.

    Files are kept where torch.hub keeps them, so what was downloaded before
    is found again.

    Args:
        filename: the URL.
        map_location: as for torch.load.
        local: loads the file that was downloaded.
    """
    path = Path(torch.hub.get_dir(), 'checkpoints',
                Path(urlparse(filename).path).name)
    if is_main_process():
        _download(filename, path)
    barrier()
    # On another machine than the first rank's.
    _download(filename, path)
    return local(str(path), map_location)


def _download(url: str, path: Path) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))


def install(local: Loader = load_from_local) -> None:
    """Make mmengine's load_from, resume and init_cfg read safely, in this
    process, from now on.

    Args:
        local: loads local files, and those that were downloaded.
    """
    # mmengine logs a loader's name.
    http = update_wrapper(partial(load_from_http, local=local),
                          load_from_http)
    CheckpointLoader.register_scheme(
        '', update_wrapper(partial(local), load_from_local), force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), http,
                                     force=True)
    # What the loaders of torchvision:// and open-mmlab:// call.
    mmengine_checkpoint.load_from_http = http


@contextmanager
def installed(local: Loader = load_from_local) -> Iterator[None]:
    """The loaders for as long as the context lasts; see :func:`install`."""
    schemes = dict(CheckpointLoader._schemes)
    http = mmengine_checkpoint.load_from_http
    install(local)
    try:
        yield
    finally:
        CheckpointLoader._schemes = schemes
        mmengine_checkpoint.load_from_http = http
