"""Let a process on the CPU keep the memory it frees."""
import ctypes
import sys

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
