"""A tape on a GPU is a CUDA graph: one launch makes all of a step's kernels run, without Python between them.

The graphs of one backend share a memory pool: one of them plays at a time, and what it leaves is taken before the next
one plays, so each may use the others' scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GraphTape:
    """See `Kernels.tape`.

    Args:
        pool: where the pass's memory comes from; see `torch.cuda.graph_pool_handle`.
    """

    def __init__(self, pool: Any) -> None:
        self.refused: str | None = None
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def note(self, run: Callable[[], Tensor]) -> Tensor:
        """Make the pass twice, once to have every kernel compiled and loaded, once into the graph, and play that.

        A pass that waits for the device, or takes decisions by its values, cannot be captured.
        """
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(self._graph, pool=self._pool):
                result = run()
        except RuntimeError as error:
            self.refused = str(error).strip().partition("\n")[0]
            torch.cuda.synchronize()
            return run()
        self.play()
        return result

    def play(self) -> None:
        """See `Tape.play`; returns before the device is done."""
        self._graph.replay()
