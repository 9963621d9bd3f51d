"""What CheckpointHook makes of a file that was loaded."""
from types import SimpleNamespace

import pytest
import torch
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
