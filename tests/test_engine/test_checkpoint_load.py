"""What CheckpointHook does with a file after it was loaded."""
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from sharded_toy import sharded_runner
from toy import toy_model

from rmoe.engine import CheckpointHook


def load(resume, prefix='', **content):
    model = toy_model()
    hook = CheckpointHook(interval=1)
    hook.after_load_checkpoint(
        SimpleNamespace(model=model, _resume=resume), dict(
            state_dict={prefix + key: value for key, value in
                        model.state_dict().items()},
            message_hub=dict(log_scalars={}), **content))
    return hook


def test_a_run_goes_on_from_its_random_state():
    states = [dict(cpu=torch.zeros(1))]
    assert load(True, rng_state=states)._rng_state is states[0]
    # As an earlier version wrote it.
    assert load(True, rng_state=states[0])._rng_state is states[0]


def test_a_file_of_a_wrapped_model_is_no_other_prefix():
    load(False, 'module.')
    with pytest.raises(ValueError, match='looked for weights under'):
        load(False, 'student.')


class Score(Hook):
    """Records the random numbers that the run draws after each validation."""
    priority = 'LOWEST'

    def __init__(self):
        self.draws = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.draws[batch_idx] = float(torch.rand(()))

    def before_val(self, runner):
        torch.rand(3)  # as a validation may


@pytest.mark.parametrize('interval', [1, 100])
def test_the_best_file_has_the_random_state_of_its_moment(tmp_path,
                                                          interval):
    """The random state in the best checkpoint is the current one, not that of
    the checkpoint before."""
    runner = sharded_runner(tmp_path, interval=interval, validate=True,
                            checkpoint=dict(save_best='toy/mean',
                                            rule='greater'))
    hook = Score()
    runner.register_hook(hook)
    runner.train()
    path = next(tmp_path.glob('best_*.pth'))
    iteration = int(path.stem.split('_')[-1])
    state = torch.load(path, weights_only=True)['rng_state'][0]['cpu']
    generator = torch.Generator()
    generator.set_state(state)
    if iteration < 4:
        assert float(torch.rand((), generator=generator)) == (
            hook.draws[iteration])
    else:
        assert torch.equal(state, torch.get_rng_state())


def test_the_best_file_stays_until_a_better_one_is_safe(tmp_path,
                                                        monkeypatch):
    runner = sharded_runner(tmp_path, max_iters=2, validate=True,
                            checkpoint=dict(save_best='toy/mean',
                                            rule='greater'))
    runner.train()
    hook = next(hook for hook in runner.hooks
                if isinstance(hook, CheckpointHook))
    best = hook.best_ckpt_path

    def full(*args, **options):
        raise OSError('No space left on device')

    monkeypatch.setattr(runner, 'save_checkpoint', full)
    runner.train_loop._iter = 3
    with pytest.raises(OSError, match='No space'):
        hook.after_val_epoch(runner, {'toy/mean': 1e6})
    assert torch.load(best, weights_only=True)['meta']['iter'] == 2
    monkeypatch.undo()
    hook.best_ckpt_path = best  # as a new run finds it
    hook.after_val_epoch(runner, {'toy/mean': -1e6})
    hook.after_val_epoch(runner, {'toy/mean': 2e6})
    assert [str(path) for path in tmp_path.glob('best_*.pth')] == [
        hook.best_ckpt_path]
