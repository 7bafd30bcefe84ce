"""Decoding steps played from tapes that were noted at start: a ladder of sizes, as CUDA graphs want it.

A step is played on the smallest rung that holds it. Rows that are left over are sequences of one token in the scratch
block: they cost what they cost and change nothing. Every rung has a tape with segments and one without, so that a batch
of the base alone pays for no adapter. What the tapes read has a fixed place, the adapters' pointer tables too, so they
stay valid while adapters come, go and change their rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from lora_serve.kernels.contract import GraphBuckets, Kernels
from lora_serve.model.batch import Batch, Run, trial
from lora_serve.model.input_buffers import Bounds, Place, Placed, Sizes, bounds_of, cut, rank_of, sizes_of
from lora_serve.model.recorded_steps import RecordedSteps, played

# Rows of the sequences of steps like those to come: few and many, long and short ones, in all combinations that kernels
# tell apart.
TRIALS = ((16,), (20, 20), (20,) * 40, (64,), (100,), (100, *(31,) * 40))
GRAPH = 16 << 20  # bytes that a tape's launches take on the device, about
NOTHING = Batch([], [], [], [0], [], [], [])


class CudaGraphs(RecordedSteps):
    """Runs batches, from a tape those that decode."""

    def __init__(
        self,
        run: Callable[[Placed], Tensor],
        kernels: Kernels,
        ladder: GraphBuckets,
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
        if not decodes or self._refuses(bool(batch.runs)) or rank_of(batch.runs, self._ranks) > self._ladder.rank:
            return self.eagerly(batch)
        runs = cut(batch.runs, self._ladder.longest)
        rows = len(batch.token_ids)
        rung = bisect_left(self._rows, max(rows, len(runs)))
        if rung == len(self._rows):
            return self.eagerly(batch)
        return played(self._noted[self._sizes(self._rows[rung], adapted=bool(runs))], replace(batch, runs=runs))[:rows]

    def prepare(self, most_rows: int, most_tokens: int, width: int, context: int) -> None:
        """Note all rungs up to the first that holds `most_rows`, and try out other steps; see `RecordedSteps.prepare`."""
        self._width, self._context = width, context
        self._rows = self._up_to(most_rows)
        logits = self._logits(self._rows[-1])  # of all rungs: one is played at a time
        for adapted in (False, True):
            for rows in reversed(self._rows):  # so that smaller ones find the memory of larger ones
                if not self._refuses(adapted):
                    self._rung(logits[:rows], adapted=adapted)
        for lengths in TRIALS:
            if sum(lengths) <= most_tokens and max(lengths) <= context:
                self._try(lengths)

    def memory(self, most_rows: int, free: Callable[[], int]) -> int:
        """See `RecordedSteps.memory`; the largest rung is tried, the smaller ones share its memory but for their launches."""
        rungs = self._up_to(most_rows)
        before = free()
        logits = self._logits(rungs[-1])
        for adapted in (False, True):
            self._rung(logits, adapted=adapted)
        taken = max(0, before - free())
        self._noted.clear()
        return taken + 2 * (len(rungs) - 1) * GRAPH

    def prove(self, first: Batch, second: Batch, alike: Callable[[Tensor, Tensor], bool]) -> None:
        """See `RecordedSteps.prove`; a rung's rows may be computed by other kernels than the batch's own number of rows."""
        self._hold(first, second, alike)

    def _refuses(self, adapted: bool) -> bool:
        """See `RecordedSteps._refuses`: adapters may need a pass that cannot be noted where the base alone does not."""
        return self.refused is not None and (adapted or not self._noted)

    def _give_up(self, reason: str) -> None:
        """Keep the tapes of the base, if there are any."""
        kept = {sizes: noted for sizes, noted in self._noted.items() if not sizes.segments}
        super()._give_up(reason)
        if not self._proved:
            self._noted.update(kept)

    def _try(self, lengths: Sequence[int]) -> None:
        """Make a step of sequences so long, each a segment, of the scratch block: its kernels are compiled now."""
        batch = replace(
            trial(lengths, self._width),
            logits_rows=range(len(lengths)),
            runs=[Run(end - length, end, 0, 1.0) for length, end in zip(lengths, accumulate(lengths), strict=True)],
            logits_runs=[Run(row, row + 1, 0, 1.0) for row in range(len(lengths))],
        )
        place = Place(sizes_of(batch), bounds_of(batch, {0: 1}), self._device)
        place.write(batch)
        self._run(place.placed)

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
