"""Lets all ranks write and read a checkpoint together.

In mmengine only rank 0 collects and writes a checkpoint, and every rank reads
the whole file onto its device. If each rank has a part of every parameter, all
ranks must take part in the writing, and no rank may load the whole file onto
its device.
"""
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from mmengine.runner import runner as mmengine_runner
from torch import nn

from rmoe import safe_loading
from rmoe.parallel.folder import (
    IN_PARTS,
    LayoutsOf,
    find_folder,
    read_folder,
    shapes_in,
    write_folder,
)
from rmoe.parallel.layout import is_laid_out
from rmoe.parallel.state import accept_full_state, gather
from rmoe.parallel.together import fail_together
from rmoe.upcycling import read_checkpoint, write_content

SHOWN = 4


def save_on_all_ranks(runner: Runner, sharded: bool, atomic: bool) -> None:
    """Make ``runner.save_checkpoint`` a collective call of all ranks.

    mmengine and the hooks still decide what a checkpoint contains.

    Args:
        runner: the runner; its ``save_checkpoint`` is replaced.
        sharded: whether every rank writes its part into a folder. Otherwise
            rank 0 writes one file of whole tensors.
        atomic: whether that file is a local one, to be written completely or
            not at all.
    """
    collect = type(runner).save_checkpoint.__wrapped__  # type: ignore
    original = mmengine_runner.save_checkpoint

    def write(content: dict[str, Any], path: str, **options: Any) -> None:
        if sharded:
            write_folder(Path(path), content)
            return
        gather(content, keep=is_main_process())
        with fail_together():
            if is_main_process():
                if atomic:
                    write_content(path, content)
                else:
                    original(content, path, **options)

    def save(*args: Any, **options: Any) -> None:
        mmengine_runner.save_checkpoint = write
        try:
            collect(runner, *args, **options)
        finally:
            mmengine_runner.save_checkpoint = original

    runner.save_checkpoint = save  # type: ignore[method-assign]


def install_loaders(runner: Runner, model: nn.Module) -> None:
    """Make this process load checkpoints into the layout of a model.

    Args:
        runner: the runner that loads the checkpoints; all parts of a folder
            are read only if it resumes training.
        model: its model without a wrapper.
    """
    optimizers = optimizers_of(runner)
    if is_laid_out(model):
        for optimizer in optimizers.values():
            accept_full_state(optimizer)
    safe_loading.install(partial(_load, runner, model, optimizers))


def _load(runner: Runner, model: nn.Module,
          optimizers: dict[tuple, torch.optim.Optimizer], filename: str,
          map_location: Any) -> dict[str, Any]:
    folder = find_folder(Path(filename).expanduser())
    if folder is not None:
        with fail_together():
            _check_fits(folder, model)
        return read_folder(
            folder, LayoutsOf(model, optimizers),
            IN_PARTS if runner._resume else ('state_dict', ))
    if is_laid_out(model):
        # The tensors are mapped from the file on disk, and each rank copies
        # only its own parts of them.
        return read_checkpoint(filename, 'cpu')
    return safe_loading.load_from_local(filename, map_location)


def optimizers_of(runner: Runner) -> dict[tuple, torch.optim.Optimizer]:
    """torch's optimizers of a runner, by the keys that lead to their state
    dicts in a checkpoint. Empty if the runner does not train."""
    wrapper = getattr(runner, 'optim_wrapper', None)
    if isinstance(wrapper, OptimWrapperDict):
        return {('optimizer', name): inner.optimizer
                for name, inner in wrapper.items()}
    optimizer = getattr(wrapper, 'optimizer', None)
    return {} if not isinstance(optimizer, torch.optim.Optimizer) else {
        ('optimizer', ): optimizer}


def _check_fits(folder: Path, model: nn.Module) -> None:
    """Check that a folder has exactly the tensors of the model, in the same
    shapes, because only then its parts can be loaded.

    Raises:
        ValueError: if not. The message names the first differences, and the
            command that makes a plain file, which can be upcycled or loaded
            in part.
    """
    found = {keys[1]: tuple(shape) for keys, shape in shapes_in(folder).items()
             if keys[0] == 'state_dict'}
    wanted = {name: tuple(value.shape)
              for name, value in model.state_dict().items()}
    different = [
        f'{name} (in the checkpoint: {found.get(name, "missing")}, in the '
        f'model: {wanted.get(name, "missing")})'
        for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if different:
        more = (f' and {len(different) - SHOWN} more'
                if len(different) > SHOWN else '')
        raise ValueError(
            f'{folder} was written rank by rank and loads only into a model '
            'with the same tensors. These differ: '
            f'{", ".join(different[:SHOWN])}{more}. To change the experts or '
            'the head, or to upcycle it, make one file of it first: python '
            f'tools/gather_checkpoint.py {folder} OUT.pth')
