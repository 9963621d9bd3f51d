"""Measures the peak memory of a training step over that of the dense model."""
import gc
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from _bench.layers import parameters
from _bench.timing import DEVICE, Row
from _bench.training import CONFIG, Training
from rmoe import compat

MIB = 2**20
# Each extra parameter takes four float32 numbers: itself, its gradient, and the
# two moments of AdamW.
UNAVOIDABLE_BYTES = 4 * 4


class PeakOfTensors:
    """Measures by how many bytes PyTorch's memory grows at most in a with
    block.

    On a GPU the allocator reports it. On the CPU the profiler records every
    allocation and release in the block. Reading the size of the process now
    and then would miss some. Memory that was allocated before the block counts
    as unchanged, and memory that oneDNN allocates for itself is not counted.

    Attributes:
        bytes: the result, set at the end of the block.
    """
    bytes = 0

    def __enter__(self) -> 'PeakOfTensors':
        gc.collect()
        if DEVICE == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU],
                                    profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if DEVICE == 'cuda':
            self.bytes = torch.cuda.max_memory_allocated() - self._start
            return
        self._profile.__exit__(*error)
        results = self._profile.profiler.kineto_results
        now = 0
        for event in sorted(
                (event for event in results.events()
                 if event.name() == '[memory]'),
                key=compat.start_of):
            now += event.nbytes()
            self.bytes = max(self.bytes, now)


def benchmark_memory(config: str | Path = CONFIG, size: int = 512,
                     batch: int = 2) -> list[Row]:
    """Peak memory of the second training step, when the optimizer has its
    moments.

    A peak counts parameters, buffers, gradients, moments, activations and
    temporary tensors. The unavoidable memory of a MoE model is the peak of
    the dense model and 16 bytes for each extra parameter.
    """
    found = {}
    for name, stage in (('dense', None), ('MoE, joint stage', 'joint')):
        training = Training(config, size, batch, dense=stage is None)
        training.step(stage)
        with PeakOfTensors() as peak:
            training.step(stage)
        found[name] = (parameters(training.model),
                       resident_bytes(training) + peak.bytes)
        del training
    dense_parameters, dense_peak = found['dense']
    rows = []
    for name, (count, peak_bytes) in found.items():
        least = dense_peak + UNAVOIDABLE_BYTES * (count - dense_parameters)
        rows.append({
            'training step': name, 'image': size, 'batch': batch,
            'parameters M': round(count / 1e6, 2),
            'peak MiB': round(peak_bytes / MIB, 1),
            'unavoidable MiB': round(least / MIB, 1),
            'over dense': round(peak_bytes / dense_peak, 3),
            'over unavoidable': round(peak_bytes / least, 3)})
    return rows


def resident_bytes(training: Training) -> int:
    """Bytes of the tensors that exist between steps: parameters, buffers and
    moments."""
    states = training.optim_wrapper.optimizer.state.values()
    tensors = [*training.model.parameters(), *training.model.buffers(),
               *(value for state in states for value in state.values()
                 if isinstance(value, torch.Tensor))]
    return sum(tensor.nbytes for tensor in tensors)
