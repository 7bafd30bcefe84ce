"""One step on the device: flat tensors in, tokens out. A fault stays with the sequence that caused it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.engine.flatten import Rows, flatten
from lora_serve.engine.sampler import Row, Sampled, prompt_logprobs, sample
from lora_serve.engine.scheduler import Work
from lora_serve.errors import EngineFault, ServeError, Unavailable
from lora_serve.model.base import ResidentBase
from lora_serve.request import Logprob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a step gave one sequence: a sampled token if its last row was reached, or why there is none.

    `prompt_logprobs` are those of the prompt tokens that this step's rows predict, in order.
    """

    work: Work
    token: int | None = None
    logprob: Logprob | None = None
    prompt_logprobs: tuple[Logprob, ...] = ()
    failure: ServeError | None = None


class Runner:
    """Runs scheduled work on the resident base."""

    def __init__(self, base: ResidentBase, block_size: int, device: torch.device) -> None:
        self._base = base
        self._block_size = block_size
        self._device = device

    def run(self, work: list[Work], slots: Mapping[str, int]) -> list[Outcome]:
        """Compute one step. Never raises: if the batch fails, its sequences are tried one by one, once."""
        try:
            return self._attempt(work, slots)
        except Exception as error:
            if len(work) > 1:
                log.warning(
                    "a batch of %d sequences failed (%s); trying them one by one", len(work), type(error).__name__
                )
                return [outcome for item in work for outcome in self.run([item], slots)]
            log.exception("a sequence failed in the forward pass")
            return [Outcome(work[0], failure=_fault(error))]

    def _attempt(self, work: list[Work], slots: Mapping[str, int]) -> list[Outcome]:
        flat = flatten(work, slots, self._block_size, self._device)
        logits = self._base.forward(flat.batch)
        prompts = {id(rows): self._prompt(rows, logits) for rows in flat.rows if rows.work.seq.wants_prompt_logits}
        sampling = [rows for rows in flat.rows if rows.samples]
        last = torch.tensor([rows.end - 1 for rows in sampling], dtype=torch.int64, device=self._device)
        sampled = self._sample(logits if len(last) == len(logits) else logits[last], sampling)
        outcomes = []
        for rows in flat.rows:
            token, logprob, failure = sampled.get(id(rows), (None, None, None))
            outcomes.append(Outcome(rows.work, token, logprob, prompts.get(id(rows), ()), failure))
        return outcomes

    def _prompt(self, rows: Rows, logits: Tensor) -> tuple[Logprob, ...]:
        """Log-probabilities of the tokens that follow each of the step's rows within the prompt."""
        item, seq = rows.work, rows.work.seq
        first = max(item.start, seq.virtual)
        following = seq.tokens[first + 1 : min(item.start + item.count, seq.prompt_end - 1) + 1]
        top = seq.request.sampling.prompt_logprobs or 0
        return tuple(prompt_logprobs(logits[rows.start : rows.start + len(following)], following, top))

    def _sample(
        self, logits: Tensor, sampling: list[Rows]
    ) -> dict[int, tuple[int | None, Logprob | None, ServeError | None]]:
        """Draw a token for each; by id of its `Rows`: (token, log-probability, failure)."""
        if not sampling:
            return {}
        rows = [
            Row(
                params=item.work.seq.request.sampling,
                seed=item.work.seq.seed,
                position=item.work.seq.generated,
                stop_ids=item.work.seq.stop_ids,
                prompt=item.work.seq.request.prompt,
                output=item.work.seq.tokens[item.work.seq.prompt_end :],
            )
            for item in sampling
        ]
        try:
            drawn = sample(logits, rows)
        except Exception as error:
            if len(rows) == 1:
                log.exception("sampling failed")
                return {id(sampling[0]): (None, None, _fault(error))}
            parts = [self._sample(logits[i : i + 1], [item]) for i, item in enumerate(sampling)]
            return {key: value for part in parts for key, value in part.items()}
        return {id(item): _result(drawn, index) for index, item in enumerate(sampling)}


def _result(drawn: Sampled, index: int) -> tuple[int | None, Logprob | None, ServeError | None]:
    if not drawn.finite[index]:
        return None, None, EngineFault("the model's output for this request is not finite")
    return drawn.token_ids[index], drawn.logprobs[index], None


def _fault(error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return Unavailable("the engine ran out of memory on this request", retry_after=1)
    return EngineFault("the engine failed on this request")
