"""The suite of a GPU: pytest -m gpu. See gpu_cases.py."""
import os

import pytest
import torch
from gpu_cases import DEVICE

# cuBLAS reads it when it starts; without it its products are refused in
# torch's deterministic mode.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')


@pytest.fixture(autouse=True)
def _in_float32():
    """Float32 is not TF32 here, and a GPU is there."""
    if DEVICE == 'cuda' and not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def cuda() -> str:
    """For what has no meaning on a CPU."""
    if DEVICE != 'cuda':
        pytest.skip('has no meaning on a CPU')
    return DEVICE


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
