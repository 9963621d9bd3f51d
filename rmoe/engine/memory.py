"""Functions for the memory of this process: one keeps freed memory for the
next tensors, others measure how much memory is in use."""
import ctypes
import gc
import os
import sys
import threading
from typing import Any

import torch

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make the process keep memory that was freed, and use it for the next
    large tensors.

    By default glibc gives a block of some megabytes back to the kernel when a
    tensor is freed. Then every step of training spends time on mapping and
    clearing its pages again. The price of keeping it is that the process
    never gets smaller.

    Returns:
        Whether it took effect, which it does with glibc.
    """
    if not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    # mallopt reads the -1 as the largest size, so nothing is given back.
    return mallopt is not None and all(
        [mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1),
         mallopt(M_TOP_PAD, 1 << 26)])


class PeakMemory:
    """Measures by how many bytes memory grows at most inside a with block.

    On a GPU it is the memory of tensors. On a CPU it is the resident size of
    the process, which a thread reads every millisecond (Linux only).
    """

    def __enter__(self) -> 'PeakMemory':
        gc.collect()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        elif resident_bytes():
            # Memory that is free but still belongs to the process would be
            # used first and hide growth. So it is given back to the kernel.
            trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
            if trim:
                trim(0)
            self._start = self._most = resident_bytes()
            self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(.001):
            self._most = max(self._most, resident_bytes())

    def peak(self) -> int | None:
        """The growth so far in bytes; None where it cannot be measured."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self._start
        if not resident_bytes():
            return None
        self._most = max(self._most, resident_bytes())
        return self._most - self._start

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()


def resident_bytes() -> int:
    """The resident size of this process; 0 where there is no /proc."""
    if not sys.platform.startswith('linux'):
        return 0
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
