"""
Host memory that is used again.

When a large tensor is freed, the C library gives its memory back to the system, which clears every page of the next
one. The sweeps allocate and free tensors of the same sizes over and over. So they are told to keep what is freed.
"""

import ctypes
import os
from contextlib import suppress
from functools import cache


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of `mallopt` in glibc's malloc.h
KEPT = 512 << 20
"""Bytes that the process may keep at the end of its heap. Without this, it is up to 64 MB."""
LARGEST = 2**31 - 1, 32 << 20
"""Larger tensors are allocated apart from the heap: the most that `mallopt` takes. Old releases take 32 MB at most."""


@cache
def keep_freed_memory() -> bool:
    """
    Let the process keep freed memory, from now on. Whether this was possible.

    It is possible with glibc's allocator, unless `GLIBC_TUNABLES` or variables that begin with `MALLOC_` set this
    allocator up.
    """
    set_up = [name for name, value in os.environ.items() if name.startswith("MALLOC_") or "glibc.malloc" in value]
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if not set_up and library.gnu_get_libc_version:
            on_the_heap = any(library.mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST)
            return bool(library.mallopt(M_TRIM_THRESHOLD, KEPT)) and on_the_heap
    return False
