"""Memory of this process: measure its growth, or keep what is freed."""
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
    """Serve large tensors from memory freed before.

    By default glibc gives a block of some megabytes back to the kernel when a
    tensor dies, and every step of training pays for mapping and clearing its
    pages again. The price is that memory once used stays with the process.

    Returns:
        Whether it took effect: with glibc it does.
    """
    if not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    # -1 is the largest size there is.
    return mallopt is not None and all(
        [mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1),
         mallopt(M_TOP_PAD, 1 << 26)])


class PeakMemory:
    """By how many bytes memory grows at most inside a with block: that of
    tensors on a GPU, else the process's resident size, looked at every
    millisecond (Linux)."""

    def __enter__(self) -> 'PeakMemory':
        gc.collect()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        elif resident_bytes():
            # Blocks that are free but still the process's would hide growth.
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
        """So far; None where it cannot be measured."""
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
    """Of this process; 0 where /proc does not tell."""
    if not sys.platform.startswith('linux'):
        return 0
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
