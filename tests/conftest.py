import pytest
import torch
from mmengine.registry import DefaultScope

import rmoe

# Before mmcv is imported, which may have no operators of its own.
assert rmoe.__version__


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=['mmseg', 'mmdet'])
def host_scope(request):
    """The default scope of a host library, as inside its tools/train.py."""
    with DefaultScope.overwrite_default_scope(request.param):
        yield request.param
