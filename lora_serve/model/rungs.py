"""Decoding steps played from tapes that were noted at start: a ladder of sizes, as CUDA graphs want it.

A step is played on the smallest rung that holds it. Rows that are left over are sequences of one token in the scratch
block: they cost what they cost and change nothing. Every rung has a tape with segments and one without, so that a batch
of the base alone pays for no adapter. What the tapes read has a fixed place, the adapters' pointer tables too, so they
stay valid while adapters come, go and change their rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_serve.kernels.contract import Kernels, Ladder
from lora_serve.model.batch import Batch
from lora_serve.model.place import Bounds, Place, Placed, Sizes, bounds_of, cut
from lora_serve.model.replay import Replay, played

GRAPH = 16 << 20  # bytes that a tape's launches take on the device, about
NOTHING = Batch([], [], [], [0], [], [], [])


class Rungs(Replay):
    """Runs batches, from a tape those that decode."""

    def __init__(
        self,
        run: Callable[[Placed], Tensor],
        kernels: Kernels,
        ladder: Ladder,
        ranks: Mapping[int, int],
        device: torch.device,
    ) -> None:
        super().__init__(run, kernels, ranks, device)
        self._ladder = ladder
        self._rows: list[int] = []  # of the rungs
        self._width = self._context = 1

    def __call__(self, batch: Batch) -> Tensor:
        """The batch's logits, valid until the next call."""
        decodes = batch.decodes and batch.runs == batch.logits_runs
        if self.refused is not None or not decodes or bounds_of(batch, self._ranks).rank > self._ladder.rank:
            return self.eagerly(batch)
        runs = cut(batch.runs, self._ladder.longest)
        rows = len(batch.token_ids)
        rung = bisect_left(self._rows, max(rows, len(runs)))
        if rung == len(self._rows):
            return self.eagerly(batch)
        return played(self._noted[self._sizes(self._rows[rung], adapted=bool(runs))], replace(batch, runs=runs))[:rows]

    def prepare(self, most_rows: int, width: int, context: int) -> None:
        """Note all rungs up to the first that holds `most_rows`; see `Replay.prepare`."""
        self._width, self._context = width, context
        self._rows = self._up_to(most_rows)
        logits = self._logits(self._rows[-1])  # of all rungs: one is played at a time
        for rows in reversed(self._rows):  # so that smaller ones find the memory of larger ones
            for adapted in (True, False):
                if self.refused is None:
                    self._rung(logits[:rows], adapted=adapted)

    def memory(self, most_rows: int, free: Callable[[], int]) -> int:
        """See `Replay.memory`; the largest rung is tried, the smaller ones share its memory but for their launches."""
        rungs = self._up_to(most_rows)
        before = free()
        self._rung(self._logits(rungs[-1]), adapted=True)
        taken = max(0, before - free())
        self._noted.clear()
        return taken + (2 * len(rungs) - 1) * GRAPH

    def prove(self, first: Batch, second: Batch, alike: Callable[[Tensor, Tensor], bool]) -> None:
        """See `Replay.prove`; a rung's rows may be computed by other kernels than the batch's own number of rows."""
        self._hold(first, second, alike)

    def _up_to(self, most_rows: int) -> list[int]:
        """Sizes of the rungs up to the first that holds so many rows; the highest there are otherwise."""
        rows = self._ladder.rows
        return list(rows[: bisect_left(rows, most_rows) + 1])

    def _logits(self, rows: int) -> Tensor:
        """Memory for the logits of so many rows."""
        return torch.empty_like(self._run(self._place(rows, adapted=False).placed))

    def _rung(self, logits: Tensor, *, adapted: bool) -> None:
        """Note a rung that leaves its logits there."""
        place = self._place(logits.shape[0], adapted=adapted)
        self._keep(self._sizes(logits.shape[0], adapted=adapted), place, lambda: logits.copy_(self._run(place.placed)))

    def _place(self, rows: int, *, adapted: bool) -> Place:
        bounds = Bounds(self._ladder.longest, self._ladder.rank, query=1, context=self._context)
        place = Place(self._sizes(rows, adapted=adapted), bounds, self._device)
        place.write(NOTHING)
        return place

    def _sizes(self, rows: int, *, adapted: bool) -> Sizes:
        return Sizes(rows, rows, rows, rows if adapted else 0, -1, self._width)
