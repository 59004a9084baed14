"""What the C library is told before JAX starts."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt's numbers, from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next step rather than return it to the kernel, which would clear every page
    again.

    Does nothing, and returns False, where the C library is another one. Call it before JAX allocates. See
    experiments/speed/README.md.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No buffer has a mapping of its own (those are unmapped when freed), and the heap is never trimmed.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
