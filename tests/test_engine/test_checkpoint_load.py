"""What CheckpointHook makes of a file that was loaded."""
from types import SimpleNamespace

import pytest
import torch
from toy import toy_model

from rmoe.engine import CheckpointHook, checkpoint_hook


def load(resume, prefix='', **content):
    model = toy_model()
    hook = CheckpointHook(interval=1)
    hook.after_load_checkpoint(
        SimpleNamespace(model=model, _resume=resume), dict(
            state_dict={prefix + key: value for key, value in
                        model.state_dict().items()},
            message_hub=dict(log_scalars={}), **content))
    return hook


@pytest.mark.parametrize('rank', [0, 1])
def test_each_rank_goes_on_from_its_own_random_state(monkeypatch, rank):
    monkeypatch.setattr(checkpoint_hook, 'get_rank', lambda: rank)
    states = [dict(cpu=torch.zeros(1)), dict(cpu=torch.ones(1))]
    assert load(True, rng_state=states)._rng_state is states[rank]


def test_a_file_of_a_wrapped_model_is_no_other_prefix():
    load(False, 'module.')
    with pytest.raises(ValueError, match='looked for weights under'):
        load(False, 'student.')
