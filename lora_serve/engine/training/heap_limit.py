"""A bound on what the C library's allocator keeps of freed memory, between quanta of training on a CPU.

Tensors of many sizes are freed after every quantum. The heap grows nevertheless, by several times what is in use: what
is freed is cut up by small objects, and no longer holds the next tensor of its size. Giving everything back after every
quantum would make small passes slower by half, since the system zeroes pages that it gives out. So it is given back
when the process has grown by more than that: a layer's tensors, or 192 MiB.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lora_serve.malloc import trim

STATM = Path("/proc/self/statm")
LEAST = 192 << 20  # bytes by which a process may always grow


def growth(layer: int) -> int:
    """Bytes of freed memory that may be kept in a pass in which a layer saves so many."""
    return max(LEAST, layer)


def heap_bytes(layer: int) -> int:
    """Bytes of freed memory that are counted for a pass in which a layer saves so many."""
    return min(4 * layer, growth(layer))


class HeapLimit:
    """Gives freed memory back when the process has grown by more than it may since it last did.

    Args:
        resident: bytes of the process in memory; None: unknown.
    """

    def __init__(self, resident: Callable[[], int | None] | None = None, give_back: Callable[[], None] = trim) -> None:
        self._resident, self._give_back = resident or _resident, give_back
        self._floor = self._resident()

    def check(self, most: int) -> None:
        """Called after a quantum; it may have grown by `most` bytes."""
        now = self._resident()
        if now is None or self._floor is None:
            return
        if now > self._floor + most:
            self._give_back()
            now = self._floor = self._resident() or now
        self._floor = min(self._floor, now)


def _resident() -> int | None:
    try:
        pages = STATM.read_text().split()
    except OSError:
        return None
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")  # without what is mapped from files
