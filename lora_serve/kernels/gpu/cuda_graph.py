"""Capture a forward pass as a CUDA graph, and replay it: one launch runs all of a step's kernels.

The graphs of one backend share a memory pool: one is replayed at a time, and its result is read before the next replay,
so each may use the others' scratch memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor


class CapturedGraph:
    """One captured pass; implements `Recording`.

    Args:
        pool: memory pool of the pass; see `torch.cuda.graph_pool_handle`.
        stream: captured on; one for all graphs, as libraries keep memory for every stream they run on.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self.unsupported: str | None = None
        self._graph = torch.cuda.CUDAGraph()
        self._pool, self._stream = pool, stream

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Run the pass twice, to compile and load every kernel and to capture it, and replay the graph.

        A pass that waits for the device, or branches on its values, cannot be captured. The first run detects that,
        before a capture begins.
        """
        current = torch.cuda.current_stream()
        try:
            self._warm_up(run)
            result = self._capture(run)
        except torch.OutOfMemoryError:
            self._abandon(current)
            raise
        except RuntimeError as error:
            self._abandon(current)
            self.unsupported = str(error).strip().partition("\n")[0]
            return run()
        self.replay()
        return result

    def replay(self) -> None:
        """Launch the graph; returns before the device is done."""
        self._graph.replay()

    def _warm_up(self, run: Callable[[], Tensor]) -> None:
        """Run the pass on the capture stream; RuntimeError where it waits for the device."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _forbid_synchronization():
            run()
        current.wait_stream(self._stream)
        torch.cuda.synchronize()

    def _capture(self, run: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream):
            return run()

    def _abandon(self, stream: torch.cuda.Stream) -> None:
        """End a failed capture: torch would stay on its stream, and its allocator in capture mode."""
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, self._pool)
        torch.cuda.synchronize()


@contextmanager
def _forbid_synchronization() -> Iterator[None]:
    """Raise RuntimeError for operations that wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not detect everything; a capture does
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
