"""A stand-in for CUDA graphs without a GPU: a replay runs the same pass again, on the same memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class MemoryRecording:
    """A `Recording` whose replay runs the pass again."""

    def __init__(self) -> None:
        self.unsupported: str | None = None
        self.replays = 0

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        self._run = run
        return run()

    def replay(self) -> None:
        self.replays += 1
        self._run()
