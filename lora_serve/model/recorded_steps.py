"""Small steps played from a tape: what repeats with other numbers is not thought through again in Python.

A step of the same sizes makes the same calls. The first such step runs as any other, the second is noted on memory of
its own, and from then on its numbers are written there and the tape is played. The calls are the same, so every bit of
the result is. Backends without a tape, and models whose pass cannot be noted, run as before. Tapes made ahead are in
`model/cuda_graphs.py`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.kernels.contract import Kernels, Recording
from lora_serve.model.batch import Batch
from lora_serve.model.input_buffers import Place, Placed, Sizes, bounds_of, placed, sizes_of

log = logging.getLogger(__name__)

MOST_ROWS = 32  # with more, Python is a small part of a step
MOST_TAPES = 64


@dataclass(frozen=True)
class RecordedStep:
    """A pass on its own memory: the batch it reads, the logits it leaves."""

    place: Place
    logits: Tensor
    tape: Recording


class RecordedSteps:
    """Runs batches, from a tape where there is one.

    Attributes:
        refused: why there are no tapes, if so.

    Args:
        run: the pass itself: a batch's logits.
        ranks: highest rank of each slot's adapter; the bank keeps it up to date.
    """

    def __init__(
        self,
        run: Callable[[Placed], Tensor],
        kernels: Kernels,
        ranks: Mapping[int, int],
        device: torch.device,
        refused: str | None = None,
    ) -> None:
        self._run = run
        self._kernels = kernels
        self._ranks = ranks
        self._device = device
        self._noted: OrderedDict[Sizes, RecordedStep] = OrderedDict()  # least recently played first
        self._seen: set[Sizes] = set()
        self.refused = refused
        self._proved = False

    def __call__(self, batch: Batch) -> Tensor:
        """The batch's logits, valid until the next call."""
        sizes = None if self._refuses(bool(batch.runs)) else _roomy(batch)
        if sizes is None:
            return self.eagerly(batch)
        noted = self._noted.get(sizes)
        if noted is None:
            if sizes in self._seen:
                return self._note(sizes, batch)
            self._seen.add(sizes)
            return self.eagerly(batch)
        self._noted.move_to_end(sizes)
        return played(noted, batch)

    def eagerly(self, batch: Batch) -> Tensor:
        """The batch's logits by a pass through Python."""
        return self._run(placed(batch, self._ranks, self._device))

    def prepare(self, most_rows: int, most_tokens: int, width: int, context: int) -> None:
        """Called once the memory is settled, before any step.

        Args:
            most_rows, most_tokens: that steps will have: that decode, and in all.
            width, context: blocks and tokens of the longest sequence.
        """

    def memory(self, most_rows: int, free: Callable[[], int]) -> int:
        """Bytes of the device that `prepare` will take; `free` says how many are free."""
        return 0

    def prove(self, first: Batch, second: Batch, alike: Callable[[Tensor, Tensor], bool]) -> None:
        """Play a step that was noted with other numbers of the same sizes; no more tapes if it is not its own pass's.

        Args:
            alike: whether two results are one but for rounding; not good enough here, where the calls are the same.
        """
        self._hold(first, second, torch.equal)

    def _hold(self, first: Batch, second: Batch, alike: Callable[[Tensor, Tensor], bool]) -> None:
        wanted = self.eagerly(second).clone()
        self(first), self(first)
        self._proved = True
        if not self._refuses(False) and not alike(self(second), wanted):
            self._give_up("it depends on more than its tensors")

    def _note(self, sizes: Sizes, batch: Batch) -> Tensor:
        place = Place(sizes, bounds_of(batch, self._ranks), self._device)
        place.write(batch)
        logits = self._keep(sizes, place, lambda: self._run(place.placed))
        if len(self._noted) > MOST_TAPES:
            self._noted.popitem(last=False)
        return logits

    def _keep(self, sizes: Sizes, place: Place, run: Callable[[], Tensor]) -> Tensor:
        """Note a pass over what the place holds, if that can be; its logits."""
        tape = self._kernels.tape(check_values=not self._proved)
        if tape is None:
            self.refused = "the kernels have no tape"
            return run()
        logits = tape.note(run)
        if tape.refused is None:
            self._noted[sizes] = RecordedStep(place, logits, tape)
        else:
            self._give_up(tape.refused)
        return logits

    def _refuses(self, adapted: bool) -> bool:
        """Whether no step is played; of a batch with adapters (`adapted`), or of the base alone."""
        return self.refused is not None

    def _give_up(self, reason: str) -> None:
        log.info("steps run through Python: the pass cannot be noted (%s)", reason)
        self.refused = reason
        self._noted.clear()


def played(noted: RecordedStep, batch: Batch) -> Tensor:
    """A batch's logits by the tape."""
    noted.place.write(batch)
    noted.tape.play()
    return noted.logits


def _roomy(batch: Batch) -> Sizes | None:
    """The batch's sizes, with room where that costs nothing; None if it has too many rows."""
    if len(batch.token_ids) > MOST_ROWS:
        return None
    exact = sizes_of(batch)
    return exact._replace(
        segments=_rounded(exact.segments),
        logits_segments=exact.logits_segments if exact.logits_segments < 0 else _rounded(exact.logits_segments),
        width=max(8, _rounded(exact.width)),
    )


def _rounded(count: int) -> int:
    """A power of two, at least 8; nothing stays nothing."""
    return 0 if count == 0 else max(8, 1 << (count - 1).bit_length())
