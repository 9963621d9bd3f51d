"""Replacements for mmengine's checkpoint loaders that execute no code in files.

Importing this module changes nothing. ``rmoe.CheckpointHook`` and the tools
install these loaders for their whole process, and MoE backbones use them to
load their own ``init_cfg``. Any other program that loads files by mmengine's
functions, such as mmseg's ``init_model``, should call :func:`install` first.
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
    """Load a local file by rmoe's safe reader instead of mmengine's loader.

    torch >= 2.6 refuses the objects that mmengine 0.10 pickles into a
    checkpoint beside its tensors. The safe reader keeps the tensors and plain
    values and leaves those objects out. It also reads .safetensors files and
    says what is wrong with a broken file.
    """
    # A resumed optimizer keeps these tensors, and training may overwrite the
    # file, so they must not be memory-mapped views of it.
    content = read_checkpoint(filename, map_location, mapped=False)
    # mmengine removes DDP's 'module.' from keys, but not torch.compile's
    # '_orig_mod.'.
    if isinstance(state := content.get('state_dict'), dict) and any(
            WRAPPERS.search(str(key)) for key in state):
        content['state_dict'] = without_wrappers(state)
    return content


def load_from_http(filename: str, map_location: Any = None,
                   local: Loader = load_from_local) -> dict[str, Any]:
    """Load a URL instead of mmengine's loader, which can execute code in the
    file that it downloads.

    Downloads are kept where torch.hub keeps them, so that a file which was
    downloaded before is found again.

    Args:
        filename: the URL.
        map_location: as for torch.load.
        local: the function that loads the downloaded file.
    """
    path = Path(torch.hub.get_dir(), 'checkpoints',
                Path(urlparse(filename).path).name)
    if is_main_process():
        _download(filename, path)
    barrier()
    # A rank on another machine does not see the download of rank 0.
    _download(filename, path)
    return local(str(path), map_location)


def _download(url: str, path: Path) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))


def install(local: Loader = load_from_local) -> None:
    """Make mmengine's load_from, resume and init_cfg use the safe loaders, in
    this process, from now on.

    Args:
        local: the function that loads local files and downloaded ones.
    """
    # mmengine logs the name of a loader, which a partial does not have.
    http = update_wrapper(partial(load_from_http, local=local),
                          load_from_http)
    CheckpointLoader.register_scheme(
        '', update_wrapper(partial(local), load_from_local), force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), http,
                                     force=True)
    # mmengine's loaders of torchvision:// and open-mmlab:// call this one.
    mmengine_checkpoint.load_from_http = http


@contextmanager
def installed(local: Loader = load_from_local) -> Iterator[None]:
    """Install the loaders while the context lasts; see :func:`install`."""
    schemes = dict(CheckpointLoader._schemes)
    http = mmengine_checkpoint.load_from_http
    install(local)
    try:
        yield
    finally:
        CheckpointLoader._schemes = schemes
        mmengine_checkpoint.load_from_http = http
