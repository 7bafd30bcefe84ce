"""One step on the device: flat batches in, tokens out. A fault stays with the sequence that caused it.

A step is launched, and its outcomes are read later; meanwhile the next one can be launched, for sequences whose tokens
only the device knows. Reading waits for the device, launching does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.engine.batch_builder import Rows, flatten
from lora_serve.engine.logprobs import PendingLogprobs, logprobs
from lora_serve.engine.sampler import PendingSamples, Row, draw
from lora_serve.engine.scheduler import Work
from lora_serve.errors import EngineFault, ServeError, Unavailable
from lora_serve.kernels.host_device_copy import to_device
from lora_serve.model.base import ResidentBase
from lora_serve.request import Logprob

log = logging.getLogger(__name__)

Landing = Callable[[], "list[SequenceOutput]"]  # waits for a launched step; what it gave


@dataclass(frozen=True)
class SequenceOutput:
    """What a step gave one sequence: a drawn token if its last row was reached, or why there is none.

    `prompt_logprobs` are those of the prompt tokens that this step's rows predict, in order; None if nobody asked.
    """

    work: Work
    token: int | None = None
    logprob: Logprob | None = None
    prompt_logprobs: list[Logprob] | None = None
    failure: ServeError | None = None


class Tokens:
    """The tokens drawn last, on the device.

    Attributes:
        read: int64 [rows]; the next pass finds them here. `written`: those that are being drawn.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.read = torch.zeros(rows, dtype=torch.int64, device=device)
        self._written = torch.zeros_like(self.read)
        self._count = 0

    def turn(self) -> None:
        """A step begins: what was written is read now."""
        self.read.copy_(self._written)
        self._count = 0

    def write(self, token_ids: Tensor) -> int:
        """Take drawn tokens in; the place of the first. Where nothing was drawn, any token will do."""
        start, self._count = self._count, self._count + token_ids.shape[0]
        self._written[start : self._count] = token_ids.clamp(min=0)
        return start


class Runner:
    """Runs scheduled work on the resident base.

    Attributes:
        exhausted: whether a launch ran out of memory, since whoever reads this last set it back.

    Args:
        tokens: where the base finds tokens that the host has not read; None if every step is read before the next one.
    """

    def __init__(self, base: ResidentBase, block_size: int, device: torch.device, tokens: Tokens | None = None) -> None:
        self._base = base
        self._block_size = block_size
        self._device = device
        self._tokens = tokens
        self.out_of_memory = False

    @property
    def overlap(self) -> bool:
        """Whether a step may be launched before the outcomes of the last one are read."""
        return self._tokens is not None

    def run(self, work: list[Work], slots: Mapping[str, int]) -> list[SequenceOutput]:
        """Launch a step and wait for it."""
        return self.launch(work, slots)()

    def launch(self, work: list[Work], slots: Mapping[str, int]) -> Landing:
        """Start one step. If the batch fails, its sequences are tried one by one, once.

        Raises only what leaves the device unusable.
        """
        if self._tokens is not None:
            self._tokens.turn()
        return self._launch(work, slots)

    def _launch(self, work: list[Work], slots: Mapping[str, int]) -> Landing:
        try:
            return self._attempt(work, slots)
        except torch.AcceleratorError:
            raise  # whatever comes after it on this device fails too
        except Exception as error:
            if len(work) == 1:
                log.exception("a sequence failed in the forward pass")
            caught = error.with_traceback(None)  # which would keep the failed pass's memory while others are tried
        if _out_of_memory(caught):
            self.out_of_memory = True
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # what is free lies in pieces
        if len(work) == 1:
            failed = SequenceOutput(work[0], failure=_fault(caught))
            return lambda: [failed]
        log.warning("a batch of %d sequences failed (%s); trying them one by one", len(work), type(caught).__name__)
        landings = [self._launch([item], slots) for item in work]
        return lambda: [outcome for landing in landings for outcome in landing()]

    def _attempt(self, work: list[Work], slots: Mapping[str, int]) -> Landing:
        flat = flatten(work, slots, self._block_size)
        logits = self._base.forward(flat.batch)
        prompts = {id(rows): self._prompt(rows, logits) for rows in flat.rows if rows.work.seq.wants_prompt_logits}
        drawing = [rows for rows in flat.rows if rows.samples]
        last = [rows.end - 1 for rows in drawing]
        if len(last) < len(logits):
            logits = logits.index_select(0, to_device(last, torch.int64, self._device))
        drawn = self._draw(logits, drawing)

        def landing() -> list[SequenceOutput]:
            found = {key: value for draw in drawn for key, value in draw().items()}
            outcomes = []
            for rows in flat.rows:
                token, logprob, failure = found.get(id(rows), (None, None, None))
                listed = prompts.get(id(rows))
                outcomes.append(
                    SequenceOutput(rows.work, token, logprob, None if listed is None else listed.wait(), failure)
                )
            return outcomes

        return landing

    def _prompt(self, rows: Rows, logits: Tensor) -> PendingLogprobs:
        """Log-probabilities of the tokens that follow each of the step's rows within the prompt."""
        item, seq = rows.work, rows.work.seq
        first = max(item.start, seq.virtual)
        following = seq.tokens[first + 1 : min(item.end, seq.prompt_end - 1) + 1]
        top = seq.request.sampling.prompt_logprobs or 0
        ids = to_device(following, torch.int64, logits.device)
        return logprobs(logits[rows.start : rows.start + len(following)], ids, [top] * len(following))

    def _draw(self, logits: Tensor, drawing: list[Rows]) -> list[Callable[[], Mapping[int, Result]]]:
        """Draw a token for each; what gives them, by id of their `Rows`."""
        if not drawing:
            return []
        rows = [
            Row(
                params=item.work.seq.request.sampling,
                seed=item.work.seq.seed,
                position=item.work.seq.generated,
                stop_ids=item.work.seq.stop_ids,
                prompt=item.work.seq.request.prompt,
                output=item.work.seq.tokens[item.work.seq.prompt_end :],
            )
            for item in drawing
        ]
        try:
            drawn = draw(logits, rows)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(rows) == 1:
                log.exception("sampling failed")
                failed = {id(drawing[0]): (None, None, _fault(error))}
                return [lambda: failed]
            return [part for i, item in enumerate(drawing) for part in self._draw(logits[i : i + 1], [item])]
        if self._tokens is not None:
            start = self._tokens.write(drawn.token_ids)
            for index, item in enumerate(drawing, start):
                item.work.seq.row = index
        return [lambda: _results(drawn, drawing)]


Result = tuple[int | None, Logprob | None, ServeError | None]


def _results(drawn: PendingSamples, drawing: list[Rows]) -> dict[int, Result]:
    sampled = drawn.wait()
    return {
        id(item): (sampled.token_ids[i], sampled.logprobs[i], None)
        if sampled.finite[i]
        else (None, None, EngineFault("the model's output for this request is not finite"))
        for i, item in enumerate(drawing)
    }


def _fault(error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    if _out_of_memory(error):
        return Unavailable("the engine ran out of memory on this request", retry_after=1)
    return EngineFault("the engine failed on this request")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
