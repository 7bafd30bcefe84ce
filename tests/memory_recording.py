"""What a graph promises, without a GPU: the same pass again, on whatever lies in the same memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class MemoryRecording:
    """A `Recording` that makes the pass again."""

    def __init__(self) -> None:
        self.refused: str | None = None
        self.plays = 0

    def note(self, run: Callable[[], Tensor]) -> Tensor:
        self._run = run
        return run()

    def play(self) -> None:
        self.plays += 1
        self._run()
