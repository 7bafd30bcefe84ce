"""glibc's allocator: few arenas, and freed memory back to the system. Elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import sys

ARENA_MAX = -8  # M_ARENA_MAX of mallopt


def limit_arenas(most: int) -> None:
    """Let all threads share `most` arenas; by default each thread keeps what it once needed in its own."""
    if (libc := _glibc()) is not None:
        libc.mallopt(ARENA_MAX, most)


def trim() -> None:
    """Return freed memory to the system. May take some milliseconds; other Python threads run meanwhile."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
