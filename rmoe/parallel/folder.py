"""A checkpoint as a folder: each rank's part, and a plain file for the rest.

The parts hold the tensors of the model, the optimizer and averaged weights,
the rest everything else, with None where a tensor was.
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

# What is in the parts; the tensors elsewhere are small, and differ by rank.
IN_PARTS = ('state_dict', 'ema_state_dict', 'optimizer')
REST = 'rest.pth'
Keys = tuple[Any, ...]  # keys from the top of a checkpoint to a tensor


def write_folder(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint as a folder, whole or not at all.

    Every rank must call this. It is written beside under another name, and
    renamed when all ranks are done. What was there before goes after that.

    Args:
        path: the folder to write.
        content: the same on every rank, but for the parts of DTensors;
            changed: its tensors are taken out.

    Raises:
        ValueError: if a rank's part does not arrive in the folder.
        Exception: what a rank met while writing, on all ranks.
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
    """Where a folder is written, and where the one before waits meanwhile."""
    return (path.with_name(f'.{path.name}.tmp'),
            path.with_name(f'.{path.name}.old'))


def find_folder(path: Path) -> Path | None:
    """The checkpoint folder of this name, or None if there is none.

    A kill may have come between the two renamings of :func:`write_folder`:
    then it is the one before.
    """
    return next((found for found in (path, _beside(path)[1])
                 if found.is_dir()), None)


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill has left of unfinished checkpoints in a folder."""
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
    """A checkpoint from a folder, in any layout.

    Where there are ranks, every one must call this. Each reads what it keeps,
    and nothing that a file asks for is run.

    Args:
        path: as found by :func:`find_folder`.
        layouts: (path, shape) of a tensor -> how to lay it out, or None for
            the whole tensor on the CPU.
        parts: those of ``IN_PARTS`` to read; the others are left out.
        progress: called with the bytes that were read and all bytes to read.

    Raises:
        ValueError: if a file is missing or cut short; names it and the rank
            that wrote it.
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
    """The global shape of every tensor in a folder's parts.

    Raises:
        ValueError: as :func:`read_folder`.
    """
    metadata, rest = _check(path)
    return {tuple(keys): metadata.state_dict_metadata[key].size
            for key, keys in rest['places'].items()}


class LayoutsOf:
    """Layouts for :func:`read_folder`: those of a model and its optimizers.

    Args:
        model: not wrapped.
        optimizers: by the path of their state dict in a checkpoint.
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
            # mmengine's averaged model has the model as its module.
            return self._model.get(path[1].removeprefix('module.'))
        parameter = self._parameters.get(path[:-1])
        if parameter is None or parameter.shape != shape:
            return None
        return layout_of(parameter)


def _take_tensors(content: dict[str, Any]
                  ) -> tuple[dict[str, Tensor], dict[str, list]]:
    """(tensors, paths), both by a name; leaves None in their places."""
    tensors, places = {}, {}
    for part in IN_PARTS:
        for container, key, path in tensors_in(content.get(part), (part, )):
            name = '.'.join(map(str, path))
            tensors[name], places[name] = container[key], list(path)
            container[key] = None
    return tensors, places


def _check(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The metadata and the rest of a folder that is whole."""
    from rmoe.parallel.folder_parts import check_parts, read_metadata
    metadata = read_metadata(folder)
    check_parts(folder, metadata)
    if not (folder / REST).is_file():
        raise ValueError(f'{folder / REST}, which rank 0 wrote, is missing: '
                         'it holds all but the weights. Copy it again from '
                         'where it was written')
    # What a resumed run keeps, such as random states, is no view of a file.
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
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*assuming the intent is to')
        yield
