import mmengine.config.config
import pytest
import torch
from accelerator import accelerated
from fresh_process import forget
from mmengine.registry import DefaultScope
from yapf.yapflib import yapf_api

import rmoe
from rmoe import compat

# Before mmcv is imported, which may have no operators of its own.
assert rmoe.__version__


def pytest_runtest_setup(item):
    """Leave out what this torch is too old for: pytest.mark.torch('2.9')."""
    for mark in item.iter_markers('torch'):
        if not compat.has_torch(mark.args[0]):
            pytest.skip(f'needs torch >= {mark.args[0]}')


@pytest.fixture(params=[False, True], ids=['cpu', 'accelerator'])
def both_paths(request):
    """A test twice; whether it runs what an accelerator runs."""
    with accelerated(request.param):
        yield request.param


@pytest.fixture(autouse=True, scope='session')
def _unformatted_configs():
    """mmengine lays out a config each time it logs or dumps one, which takes
    longer than most trainings here; it is the same Python without."""
    with pytest.MonkeyPatch.context() as patch:
        # mmengine imported it; the fork imports it each time.
        for module in (mmengine.config.config, yapf_api):
            patch.setattr(module, 'FormatCode',
                          lambda text, **_: (text, False), raising=False)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_process():
    """No test depends on which tests ran before it in the same process."""
    yield
    forget()


@pytest.fixture(params=['mmseg', 'mmdet'])
def host_scope(request):
    """The default scope of a host library, as inside its tools/train.py."""
    with DefaultScope.overwrite_default_scope(request.param):
        yield request.param
