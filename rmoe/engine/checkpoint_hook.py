"""Checkpoints that are whole, and that load under weights_only=True."""
import os
from collections import deque
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from rmoe import safe_loading
from rmoe.engine.head_check import unfilled
from rmoe.moe import moe_layers
from rmoe.registry import HOOKS
from rmoe.upcycling import check_prefix, state_dict_of, write_atomically

ATOMIC_BACKEND = 'rmoe_atomic_local'


class AtomicLocalBackend(LocalBackend):
    """Local files that appear whole or not at all."""

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        write_atomically(filepath, obj)


register_backend(ATOMIC_BACKEND, AtomicLocalBackend)


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's CheckpointHook, with its arguments, and five differences.

    Files are written under a temporary name and renamed, and old ones are
    removed after the new one is safe: a full disk or a kill leaves the
    previous checkpoint whole. What mmengine pickles beside the tensors (its
    log buffers) is saved as tensors and built again after loading, so that
    torch >= 2.6 can resume; the file loads anywhere under weights_only=True.
    Files are read, not executed (:mod:`rmoe.safe_loading`).
    The random state is saved, so that router noise and stochastic depth go on
    after a resume as if nothing had happened.
    What a checkpoint cannot fill is no secret of the log: a backbone under
    another prefix raises; a head of another class count is told of before
    training, and raises before an evaluation and in a resumed run.
    """
    backend_args: dict | None
    keep_ckpt_ids: deque
    _rng_state: dict[str, torch.Tensor] | None = None
    _all_rng_states: list[dict[str, torch.Tensor]] | None = None
    _unfilled = ''

    def before_run(self, runner: Runner) -> None:
        # Before anything is loaded.
        safe_loading.install()

    def before_train(self, runner: Runner) -> None:
        if self.backend_args is None and '://' not in str(
                self.out_dir or runner.work_dir):
            self.backend_args = dict(backend=ATOMIC_BACKEND)
        super().before_train(runner)
        if self._unfilled:
            runner.logger.warning('the checkpoint leaves as they are '
                                  f'initialised {self._unfilled}')
            self._unfilled = ''

    def before_val(self, runner: Runner) -> None:
        self._check_head()

    def before_test(self, runner: Runner) -> None:
        self._check_head()

    def _check_head(self) -> None:
        """After a load that no training followed."""
        if self._unfilled:
            raise ValueError(
                'an evaluation would meet random weights: the checkpoint '
                f'cannot fill {self._unfilled}. Evaluate with the config it '
                'was trained with')

    def before_train_epoch(self, runner: Runner) -> None:
        # Before an epoch's dataloader draws the seed of its workers and its
        # first batch. Other loops first skip the data they have seen.
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._restore_rng_state()

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: object = None) -> None:
        self._restore_rng_state()

    def _restore_rng_state(self) -> None:
        if self._rng_state is not None:
            _set_rng_state(self._rng_state)
            self._rng_state = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        hub = checkpoint['message_hub']
        hub['log_scalars'] = {
            key: _pack(buffer) for key, buffer in hub['log_scalars'].items()
        }
        for part in ('message_hub', 'meta'):
            checkpoint[part] = _plain(checkpoint[part])
        # Of every rank; save_best may come before any other checkpoint.
        checkpoint['rng_state'] = self._all_rng_states or [_rng_state()]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        # Other backbones' checkpoints look like anything.
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
            if isinstance(states, dict):  # an earlier version's
                states = [states]
            if states:
                self._rng_state = states[get_rank() % len(states)]
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

    def _save_checkpoint_with_step(self, runner: Runner, step: int,
                                   meta: dict) -> None:
        # What the run draws before its next iteration, as validation does, a
        # resumed run does not: both go on from the state of this moment.
        self._rng_state = _rng_state()
        self._all_rng_states = all_gather_object(self._rng_state)
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
        if not is_main_process():
            return
        write_atomically(os.path.join(runner.work_dir, 'last_checkpoint'),
                         self.last_ckpt.encode())
        for old in outdated:
            path = self.file_backend.join_path(
                self.out_dir, self.filename_tmpl.format(old))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)


def _rng_state() -> dict[str, torch.Tensor]:
    state = {'cpu': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state['cpu'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


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
    """numpy scalars and arrays to numbers and lists, inside containers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value
