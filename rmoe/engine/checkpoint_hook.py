"""Saves checkpoints that are never left half-written, that load under
``weights_only=True``, and from which a run resumes as if it had not
stopped."""
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from rmoe import compat, safe_loading
from rmoe.engine.collective_checkpoint import (
    install_loaders,
    save_on_all_ranks,
)
from rmoe.engine.head_check import unfilled
from rmoe.engine.random_state import (
    State,
    own_state,
    random_state,
    restore,
    separate_ranks,
    states_of_all_ranks,
)
from rmoe.engine.wrappers import unwrapped
from rmoe.moe import moe_layers
from rmoe.parallel.folder import clear_leftovers
from rmoe.parallel.layout import is_laid_out
from rmoe.registry import HOOKS
from rmoe.upcycling import check_prefix, state_dict_of, write_atomically

ATOMIC_BACKEND = 'rmoe_atomic_local'


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, which writes a file completely or
    not at all."""

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        write_atomically(filepath, obj)


register_backend(ATOMIC_BACKEND, AtomicLocalBackend)


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's CheckpointHook, with the same arguments and these
    differences.

    - Files are written under a temporary name and then renamed, and older
      ones are removed only after that. So a full disk or a killed process
      leaves the previous checkpoint complete.
    - mmengine pickles its log buffers beside the tensors. Here they are saved
      as tensors, and built again after loading. So torch >= 2.6 can resume,
      and the file loads anywhere under ``weights_only=True``. No code in a
      file is executed (:mod:`rmoe.safe_loading`).
    - The random state of every rank is saved, so that router noise and
      stochastic depth continue after a resume as if the run had not stopped.
      Ranks that were seeded alike draw different numbers from the start of
      training.
    - Weights that a checkpoint cannot fill are reported. A backbone under
      another prefix raises. A head with another number of classes is named in
      a warning before training, and raises before an evaluation and in a
      resumed run.
    - A checkpoint does not depend on how parameters are laid out over
      processes. A sharded model is gathered on rank 0, tensor by tensor, into
      the file that one process would have written, and loads from such a
      file.

    Args:
        sharded: write folders instead of files. Every rank writes its part,
            which is faster, and no rank holds the whole model. A run resumes
            from a folder in any layout and with any number of ranks, and
            tools/gather_checkpoint.py makes a plain file of it.
        arguments: the arguments of mmengine's hook.

    Raises:
        ValueError: for sharded=True with a torch that is too old, with
            ``published_keys``, or with an ``out_dir`` or ``backend_args``
            that is no local folder.
    """
    saves_all_parts = True
    backend_args: dict | None
    filename_tmpl: str
    keep_ckpt_ids: deque
    _rng_state: State | None = None
    _all_rng_states: list[State] | None = None
    _unfilled = ''

    def __init__(self, *arguments: Any, sharded: bool = False,
                 **named_arguments: Any) -> None:
        super().__init__(*arguments, **named_arguments)
        self.sharded = sharded
        if not sharded:
            return
        compat.require('CheckpointHook(sharded=True)')
        if self.published_keys is not None:
            raise ValueError(
                f'published_keys={self.published_keys} needs a file, and '
                'sharded=True writes folders: leave one of them out, and make '
                'the file with tools/gather_checkpoint.py')
        # mmengine's default name ends in .pth, which would be wrong for a
        # folder. A template that the user gave is kept.
        if named_arguments.get('filename_tmpl') is None:
            self.filename_tmpl = self.filename_tmpl.removesuffix('.pth')

    def before_run(self, runner: Runner) -> None:
        # before_run comes before the runner loads any checkpoint.
        install_loaders(runner, unwrapped(runner.model))

    def before_train(self, runner: Runner) -> None:
        safe_loading.install()
        out_dir = str(self.out_dir or runner.work_dir)
        if self.backend_args is None and '://' not in out_dir:
            self.backend_args = dict(backend=ATOMIC_BACKEND)
        atomic = (self.backend_args or {}).get('backend') == ATOMIC_BACKEND
        if self.sharded and not atomic:
            raise ValueError(
                f'sharded=True needs a folder that all ranks see, not '
                f'out_dir={out_dir!r} with backend_args={self.backend_args}: '
                'leave sharded out, or give a local out_dir')
        super().before_train(runner)
        if self.sharded and is_main_process():
            clear_leftovers(Path(self.out_dir))
        if self.sharded or is_laid_out(runner.model):
            save_on_all_ranks(runner, self.sharded, atomic)
        if self._unfilled:
            runner.logger.warning('some weights keep their initial values: '
                                  'the checkpoint cannot fill '
                                  f'{self._unfilled}')
            self._unfilled = ''
        # The weights were initialised before, with the same seed on all
        # ranks. From here on ranks may draw different numbers.
        if self._rng_state is None:
            separate_ranks()

    def before_val(self, runner: Runner) -> None:
        safe_loading.install()
        self._check_head()

    def before_test(self, runner: Runner) -> None:
        safe_loading.install()
        self._check_head()

    def _check_head(self) -> None:
        """Raise if the checkpoint that was loaded did not fill the head, and
        no training has followed that could have learned it."""
        if self._unfilled:
            raise ValueError(
                'the model would be evaluated with random weights: the '
                f'checkpoint cannot fill {self._unfilled}. Evaluate with the '
                'config that the checkpoint was trained with')

    def before_train_epoch(self, runner: Runner) -> None:
        # At the start of an epoch the dataloader draws the seed of its workers
        # and its first batch, so the state must be restored before. A resumed
        # loop that counts iterations first reads and drops the batches that it
        # has trained on; there the state is restored before the next iteration.
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._restore_rng_state()

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: object = None) -> None:
        self._restore_rng_state()

    def _restore_rng_state(self) -> None:
        if self._rng_state is not None:
            restore(self._rng_state)
            self._rng_state = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        hub = checkpoint['message_hub']
        hub['log_scalars'] = {
            key: _pack(buffer) for key, buffer in hub['log_scalars'].items()
        }
        for part in ('message_hub', 'meta'):
            checkpoint[part] = _plain(checkpoint[part])
        # Something other than this hook may call save_checkpoint. Then only
        # the state of this rank is known.
        checkpoint['rng_state'] = self._all_rng_states or [random_state()]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = unwrapped(runner.model)
        # Only backbones with MoE layers are checked: the names in checkpoints
        # of other backbones follow no rule that is known here.
        backbone = getattr(model, 'backbone', nn.Identity())
        if moe_layers(backbone):
            check_prefix(backbone, state_dict_of(checkpoint), 'backbone.')
        self._unfilled = unfilled(model, checkpoint)
        if runner._resume:
            if self._unfilled:
                raise ValueError(
                    f'the checkpoint cannot fill {self._unfilled}. Its '
                    'optimizer state does not fit this model: start from its '
                    'weights instead, with load_from=CHECKPOINT and without '
                    '--resume')
            states = checkpoint.get('rng_state')
            if isinstance(states, dict):  # as earlier versions of rmoe saved
                states = [states]
            if states:
                self._rng_state = own_state(states)
        hub = checkpoint.get('message_hub')
        if hub is not None:
            hub['log_scalars'] = {
                key: _unpack(value) if isinstance(value, dict) else value
                for key, value in hub['log_scalars'].items()
            }
        elif runner._resume:
            raise ValueError(
                'this checkpoint holds weights but no training state to '
                'resume: start from its weights instead, with '
                'load_from=CHECKPOINT and without --resume')

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        # Only rank 0 writes the best checkpoint, so it needs the current
        # random states of all ranks.
        self._all_rng_states = states_of_all_ranks()
        before = self._best_checkpoints()
        # mmengine removes the previous best checkpoint before it writes the
        # better one. Here it does not learn of the previous ones, and they
        # are removed below.
        self._set_best_checkpoints(dict.fromkeys(before))
        super().after_val_epoch(runner, metrics)
        self._all_rng_states = None
        now = self._best_checkpoints()
        self._set_best_checkpoints({
            name: now[name] or before[name] for name in before})
        if is_main_process():
            for name, path in before.items():
                if path and now[name] and path != now[name]:
                    self._remove(path)

    def _best_checkpoints(self) -> dict[str, str | None]:
        """The path of the best checkpoint for each metric of save_best, under
        '' if there is only one."""
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best_checkpoints(self, paths: dict[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = paths

    def _save_checkpoint_with_step(self, runner: Runner, step: int,
                                   meta: dict) -> None:
        # Validation draws random numbers before the next iteration, but a run
        # that resumes from this checkpoint does not validate first. Therefore
        # both restart the next iteration from the random state of now.
        self._rng_state = random_state()
        self._all_rng_states = states_of_all_ranks()
        outdated: list[int] = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            ids = [*self.keep_ckpt_ids, step]
            outdated = ids[:-self.max_keep_ckpts]
            self.keep_ckpt_ids = deque(ids[-self.max_keep_ckpts:],
                                       self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids',
                                           list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir, name, self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler, meta=meta,
            by_epoch=self.by_epoch, backend_args=self.backend_args,
            **self.args)
        self._all_rng_states = None
        if not is_main_process():
            return
        write_atomically(os.path.join(runner.work_dir, 'last_checkpoint'),
                         self.last_ckpt.encode())
        for old in outdated:
            self._remove(self.file_backend.join_path(
                self.out_dir, self.filename_tmpl.format(old)))

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)


def _pack(buffer: HistoryBuffer) -> dict[str, Any]:
    log, count = buffer.data
    return dict(log=torch.from_numpy(log.astype(np.float64)),
                count=torch.from_numpy(count.astype(np.float64)),
                max_length=buffer.max_length)


def _unpack(packed: dict[str, Any]) -> HistoryBuffer:
    return HistoryBuffer(packed['log'].cpu().numpy(),
                         packed['count'].cpu().numpy(),
                         packed['max_length'])


def _plain(value: Any) -> Any:
    """Turn numpy scalars and arrays inside of containers into numbers and
    lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value
