"""A second CUDA stream beside the current one, for kernels of a captured graph that may run at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StreamFork:
    """Runs work on a stream of its own, from a fork to a join with the current stream.

    The caching allocator knows nothing of the second stream: memory that the work uses must have been allocated before
    the fork and be kept until the join, and the work must allocate none.

    Args:
        cuda: the module `torch.cuda`, or what stands for it in tests.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._side: Any = None

    def prepare(self) -> None:
        """Create the second stream, which must not happen during a capture."""
        if self._side is None:
            self._side = self._cuda.Stream()

    @property
    def ready(self) -> bool:
        """Whether the current stream is being captured. Elsewhere a fork costs the host more than the device gains."""
        return self._side is not None and bool(self._cuda.is_current_stream_capturing())

    @contextmanager
    def beside(self, work: Callable[[], None]) -> Iterator[None]:
        """Launch `work` on the second stream, then the body on the current one, which at the end waits for both."""
        current = self._cuda.current_stream()
        self._side.wait_stream(current)
        with self._cuda.stream(self._side):
            work()
        try:
            yield
        finally:
            current.wait_stream(self._side)
