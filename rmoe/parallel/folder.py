"""Checkpoints that are folders, into which each rank writes its own part.

The part files hold the tensors of the model, of the optimizer and of averaged
weights. A plain file, ``rest.pth``, holds everything else, with None in the
place of each of these tensors.
"""
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from torch import Tensor, nn

from rmoe.parallel.layout import Layout, layout_of
from rmoe.parallel.state import numbered_parameters, tensors_in
from rmoe.parallel.together import fail_together
from rmoe.upcycling import read_checkpoint, write_content

# The entries of a checkpoint whose tensors are in the part files. Tensors in
# other entries are small, and differ by rank.
IN_PARTS = ('state_dict', 'ema_state_dict', 'optimizer')
REST = 'rest.pth'
Keys = tuple[Any, ...]  # keys from the top of a checkpoint to a tensor


def write_folder(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint as a folder, whole or not at all.

    Every rank must call this. The folder is written under a temporary name
    beside ``path``, and renamed when all ranks are done. An older folder at
    ``path`` is deleted after that.

    Args:
        path: the folder to write.
        content: the checkpoint, equal on all ranks except that each has its
            own parts of DTensors. It is changed: its tensors are taken out.

    Raises:
        ValueError: if a rank's part does not arrive in the folder.
        Exception: the error that any rank met while writing, on all ranks.
    """
    from torch.distributed import checkpoint as dcp
    temporary, aside = _beside(path)
    with fail_together():
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    tensors, places = _take_tensors(content)
    with _one_process_is_enough():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary))
    with fail_together():
        if is_main_process():
            write_content(temporary / REST, dict(content=content,
                                                 places=places))
            _check(temporary)
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            temporary.rename(path)
            shutil.rmtree(aside, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    """The temporary name under which a folder is written, and the name that
    an older folder has while it is replaced."""
    return (path.with_name(f'.{path.name}.tmp'),
            path.with_name(f'.{path.name}.old'))


def find_folder(path: Path) -> Path | None:
    """The checkpoint folder of this name, or None if there is none.

    If :func:`write_folder` was killed between its two renamings, this is the
    older folder.
    """
    return next((found for found in (path, _beside(path)[1])
                 if found.is_dir()), None)


def clear_leftovers(folder: Path) -> None:
    """Remove what is left in a folder of checkpoints whose writing was killed.

    An older checkpoint that was moved aside and not replaced gets its name
    back.
    """
    for temporary in folder.glob('.*.tmp'):
        if temporary.is_dir():
            shutil.rmtree(temporary)
    for aside in folder.glob('.*.old'):
        path = aside.with_name(aside.name[1:].removesuffix('.old'))
        if aside.is_dir() and path.exists():
            shutil.rmtree(aside)
        elif aside.is_dir():
            aside.rename(path)


def read_folder(path: Path, layouts: Callable[[Keys, torch.Size],
                                              Layout | None],
                parts: tuple[str, ...] = IN_PARTS,
                progress: Callable[[int, int], None] | None = None
                ) -> dict[str, Any]:
    """Read a checkpoint from a folder, in any layout.

    In a distributed run every rank must call this. Each rank reads only what
    it keeps, and no code in a file is executed.

    Args:
        path: as found by :func:`find_folder`.
        layouts: maps the keys that lead to a tensor, and its shape, to the
            layout it gets, or to None for the whole tensor on the CPU.
        parts: the entries of ``IN_PARTS`` to read; the others are left out.
        progress: called with the number of bytes that were read so far and
            the number of all bytes to read.

    Raises:
        ValueError: if a file is missing or cut short; names the file and the
            rank that wrote it.
    """
    from torch.distributed import checkpoint as dcp

    from rmoe.parallel.folder_parts import PartsReader
    with fail_together():
        metadata, rest = _check(path)
        content = rest['content']
        tensors = {
            key: _empty(metadata.state_dict_metadata[key], keys, layouts)
            for key, keys in rest['places'].items() if keys[0] in parts}
    for part in set(IN_PARTS).difference(parts):
        content.pop(part, None)
    with _one_process_is_enough():
        dcp.load(tensors, storage_reader=PartsReader(path),
                 planner=_planner(tensors, progress))
    for key, tensor in tensors.items():
        container = content
        *above, last = rest['places'][key]
        for name in above:
            container = container[name]
        container[last] = tensor
    return content


def shapes_in(path: Path) -> dict[Keys, torch.Size]:
    """The global shape of every tensor in a folder's part files.

    Raises:
        ValueError: as :func:`read_folder`.
    """
    metadata, rest = _check(path)
    return {tuple(keys): metadata.state_dict_metadata[key].size
            for key, keys in rest['places'].items()}


class LayoutsOf:
    """Layouts for :func:`read_folder`: those of a model and its optimizers.

    Args:
        model: the model without a wrapper.
        optimizers: its optimizers, by the keys that lead to their state dicts
            in a checkpoint.
    """

    def __init__(self, model: nn.Module, optimizers: Mapping[
            Keys, torch.optim.Optimizer]) -> None:
        self._model = {name: layout_of(value)
                       for name, value in model.state_dict().items()}
        self._parameters = {
            (*path, 'state', number): parameter
            for path, optimizer in optimizers.items()
            for number, parameter in numbered_parameters(optimizer).items()}

    def __call__(self, path: Keys, shape: torch.Size) -> Layout | None:
        if path[0] != 'optimizer':
            # mmengine's averaged model has the model as its submodule
            # 'module'.
            return self._model.get(path[1].removeprefix('module.'))
        parameter = self._parameters.get(path[:-1])
        if parameter is None or parameter.shape != shape:
            return None
        return layout_of(parameter)


def _take_tensors(content: dict[str, Any]
                  ) -> tuple[dict[str, Tensor], dict[str, list]]:
    """Replace the tensors of a checkpoint by None.

    Returns:
        The tensors, and the keys that lead to them, both by the joined keys.
    """
    tensors, places = {}, {}
    for part in IN_PARTS:
        for container, key, path in tensors_in(content.get(part), (part, )):
            name = '.'.join(map(str, path))
            tensors[name], places[name] = container[key], list(path)
            container[key] = None
    return tensors, places


def _check(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Check that a folder is complete, and read its metadata and its
    ``rest.pth``."""
    from rmoe.parallel.folder_parts import check_parts, read_metadata
    metadata = read_metadata(folder)
    check_parts(folder, metadata)
    if not (folder / REST).is_file():
        raise ValueError(f'{folder / REST}, which rank 0 wrote, is missing: '
                         'it holds all but the weights. Copy it again from '
                         'where it was written')
    # A resumed run keeps some of it, such as random states, which must not be
    # views of a file.
    return metadata, read_checkpoint(folder / REST, mapped=False)


def _empty(metadata: Any, path: list[Any],
           layouts: Callable[[Keys, torch.Size], Layout | None]) -> Tensor:
    layout = layouts(tuple(path), metadata.size)
    dtype = metadata.properties.dtype
    return (layout.empty(metadata.size, dtype) if layout else
            torch.empty(metadata.size, dtype=dtype))


def _planner(tensors: dict[str, Tensor],
             progress: Callable[[int, int], None] | None) -> Any:
    from torch.distributed.checkpoint import DefaultLoadPlanner
    total = sum(tensor.numel() * tensor.element_size()
                for tensor in tensors.values())

    class Planner(DefaultLoadPlanner):
        done = 0

        def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
            super().commit_tensor(read_item, tensor)
            self.done += tensor.numel() * tensor.element_size()
            if progress is not None:
                progress(self.done, total)

    return Planner()


@contextmanager
def _one_process_is_enough() -> Iterator[None]:
    # torch warns where there is no process group.
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*assuming the intent is to')
        yield
