"""The kernel contract: passes that are replayed without the model's Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

ReplaySupport = Literal["none", "recorded_steps", "cuda_graphs"]


@dataclass(frozen=True)
class GraphBuckets:
    """Sizes of steps for which CUDA graphs are captured at start; each serves smaller steps too.

    Attributes:
        rows: of steps in which every sequence decodes, ascending.
        max_segment_rows: bound of such a step's segments; see `Segments`.
        max_rank: bound of the segments of all steps.
        tokens, sequences: of steps with prompt tokens, ascending; every number of tokens with every one of sequences.
    """

    rows: tuple[int, ...]
    max_segment_rows: int
    max_rank: int
    tokens: tuple[int, ...] = ()
    sequences: tuple[int, ...] = ()


class Recording(Protocol):
    """A forward pass recorded once, to be replayed on the same memory without the model's Python.

    Attributes:
        unsupported: why the pass cannot be replayed; None if it can.
    """

    unsupported: str | None

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a pass and record it; its result, whose memory every replay writes again."""
        ...

    def replay(self) -> None:
        """Run the recorded pass again; the device may still be at it when this returns."""
        ...


class ReplayOperations(Protocol):
    """Recordings of passes.

    Attributes:
        replay: how steps are run without the model's Python: "recorded_steps" are recorded the second time that their
            shape occurs, each for exactly that shape; "cuda_graphs" are captured at start for `graph_buckets`.
    """

    replay: ReplaySupport
    graph_buckets: GraphBuckets | None

    def new_recording(self, *, check_values: bool) -> Recording:
        """An empty recording for one pass; only where `replay` is not "none".

        Args:
            check_values: also detect values that reach Python (`tolist`, `numpy`), which would make a replay wrong;
            slow.
        """
        ...
