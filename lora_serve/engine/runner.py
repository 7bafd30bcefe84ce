"""Run a step on the device: batch in, sampled tokens out. A failure ends only the sequence that caused it.

A step has three parts: launch its forward pass, launch sampling, read its outputs. Only the last waits for the device.
The forward pass of the next step can be launched for sequences whose sampled tokens only the device knows; sampling,
which may depend on earlier tokens (penalties, grammars), needs the outputs of the previous step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.engine.batch_builder import LogitsRows, build_batch
from lora_serve.engine.logprobs import PendingLogprobs, logprobs
from lora_serve.engine.pooling import PendingSums, sum_hidden
from lora_serve.engine.sampler import PendingSamples, SamplingRow, sample
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.token_masks import MaskOrError, TokenMasks
from lora_serve.errors import EngineFault, ServeError, Unavailable
from lora_serve.kernels.host_device_copy import to_device
from lora_serve.model.base import ResidentBase
from lora_serve.model.tensor_parallel import RanksOutOfStep
from lora_serve.request import Logprob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SequenceOutput:
    """A step's output for one sequence: its sampled token, if one was sampled, or the failure that ends it.

    `prompt_logprobs`: of the prompt tokens that this step's rows predict, in order; None if not requested.
    `hidden_sum`: float32 [hidden], the sum of the step's hidden states that are pooled; None if there are none.
    """

    part: ScheduledSequence
    token: int | None = None
    logprob: Logprob | None = None
    prompt_logprobs: list[Logprob] | None = None
    failure: ServeError | None = None
    hidden_sum: Tensor | None = None


Outputs = Callable[[], list[SequenceOutput]]  # waits for a launched step and returns its outputs
LaunchSampling = Callable[[], Outputs]  # launches the sampling of a step whose forward pass was launched
TokenOrFault = tuple[int | None, Logprob | None, ServeError | None]  # token and log-probability, or failure


class SampledTokens:
    """Sampled tokens kept on the device, for steps launched before the host has read them.

    Attributes:
        previous: int64 [rows], sampled by the previous step; input of the forward pass.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.previous = torch.zeros(rows, dtype=torch.int64, device=device)
        self._current = torch.zeros_like(self.previous)
        self._count = 0

    def begin_step(self) -> None:
        """Make the tokens written in the previous step readable in this one."""
        self.previous.copy_(self._current)
        self._count = 0

    def write(self, token_ids: Tensor) -> int:
        """Append sampled tokens; returns the row of the first. Rows without a token (-1) get an arbitrary one."""
        start, self._count = self._count, self._count + token_ids.shape[0]
        self._current[start : self._count] = token_ids.clamp(min=0)
        return start


class Runner:
    """Runs scheduled sequences on the resident base.

    Attributes:
        out_of_memory: whether a launch ran out of memory; the reader resets it.

    Args:
        tokens: sampled tokens on the device; None if every step's outputs are read before the next launch.
    """

    def __init__(
        self, base: ResidentBase, block_size: int, device: torch.device, tokens: SampledTokens | None = None
    ) -> None:
        self._base = base
        self._block_size = block_size
        self._device = device
        self._tokens = tokens
        self._token_masks = TokenMasks(device)
        self.out_of_memory = False

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the outputs of the last one are read."""
        return self._tokens is not None

    @property
    def token_buckets(self) -> Sequence[int]:
        """Numbers of tokens that steps with prompt tokens are padded to, ascending."""
        return self._base.token_buckets

    def launch(self, scheduled: list[ScheduledSequence], slots: Mapping[str, int]) -> LaunchSampling:
        """Launch one step's forward pass. If the batch fails, its sequences are retried one by one, once.

        Raises only errors that leave the device unusable.
        """
        if self._tokens is not None:
            self._tokens.begin_step()
        return self._launch(scheduled, slots)

    def _launch(
        self, scheduled: list[ScheduledSequence], slots: Mapping[str, int], *, retried: bool = False
    ) -> LaunchSampling:
        try:
            return self._attempt(scheduled, slots, keep_logits=retried)
        except (torch.AcceleratorError, RanksOutOfStep):
            raise  # the device is unusable from now on, or the other devices wait for what was not computed
        except Exception as error:
            if len(scheduled) == 1:
                log.exception("the forward pass failed for one sequence")
            caught = error.with_traceback(None)  # a traceback would keep the failed pass's memory alive
        if _out_of_memory(caught):
            self.out_of_memory = True
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # the free memory is fragmented
        if len(scheduled) == 1:
            failed = SequenceOutput(scheduled[0], failure=_fault(caught))
            return lambda: lambda: [failed]
        kind = type(caught).__name__
        log.warning("a batch of %d sequences failed (%s); trying them one by one", len(scheduled), kind)
        each = [self._launch([part], slots, retried=True) for part in scheduled]

        def sample_each() -> Outputs:
            sampled = [launch_sampling() for launch_sampling in each]
            return lambda: [output for outputs in sampled for output in outputs()]

        return sample_each

    def _attempt(
        self, scheduled: list[ScheduledSequence], slots: Mapping[str, int], *, keep_logits: bool
    ) -> LaunchSampling:
        """Launch a forward pass (`keep_logits`: another one is launched before sampling)."""
        batch, owners = build_batch(scheduled, slots, self._block_size)
        masks = None if self.overlaps else self._start_masks(owners)
        sums: PendingSums | None = None
        if batch.hidden_rows:
            logits, hidden = self._base.forward_with_hidden(batch)
            sums = sum_hidden(hidden, [part for part, _ in owners])
        else:
            logits = self._base.forward(batch)
        prompts = {
            id(part): self._prompt_logprobs(part, logits[rows]) for part, rows in owners if part.seq.wants_prompt_logits
        }
        last = [rows.stop - 1 for part, rows in owners if part.samples]
        if len(last) < len(logits):
            logits = logits.index_select(0, to_device(last, torch.int64, self._device))
        elif keep_logits:
            logits = logits.clone()
        return lambda: self._launch_sampling(owners, logits, prompts, sums, masks or self._start_masks(owners))

    def _launch_sampling(
        self,
        owners: LogitsRows,
        logits: Tensor,
        prompts: Mapping[int, PendingLogprobs],
        sums: PendingSums | None,
        masks: Callable[[], dict[int, MaskOrError]],
    ) -> Outputs:
        """Launch sampling. `logits`: [sequences that sample, vocab]; `prompts` and masks by id(scheduled sequence)."""
        allowed = masks()
        refused: dict[int, TokenOrFault] = {
            key: (None, None, mask) for key, mask in allowed.items() if isinstance(mask, ServeError)
        }
        sampling = [part for part, _ in owners if part.samples]
        rows = [
            row
            for row, part in enumerate(sampling)
            if part.seq.matcher is None or (part.awaits_token and id(part) not in refused)
        ]
        if len(rows) < len(sampling):
            logits, sampling = logits[rows], [sampling[row] for row in rows]
        samples = self._sample(logits, sampling, allowed)

        def outputs() -> list[SequenceOutput]:
            sampled = refused | {key: value for read in samples for key, value in read().items()}
            pooled = {} if sums is None else sums.wait()
            found = []
            for part, _ in owners:
                token, logprob, failure = sampled.get(id(part), (None, None, None))
                listed = prompts.get(id(part))
                prompt_logprobs = None if listed is None else listed.wait()
                found.append(SequenceOutput(part, token, logprob, prompt_logprobs, failure, pooled.get(id(part))))
            return found

        return outputs

    def _start_masks(self, owners: LogitsRows) -> Callable[[], dict[int, MaskOrError]]:
        """Start to compute the token masks of the sequences that sample; returns a function that waits for them."""
        found = [(part, part.seq.matcher) for part, _ in owners if part.seq.matcher is not None and part.awaits_token]
        if not found:
            return dict
        matchers = [matcher for _, matcher in found]
        wait = self._token_masks.start(matchers, [part.end - part.seq.prompt_end for part, _ in found])
        return lambda: {id(part): mask for (part, _), mask in zip(found, wait(), strict=True)}

    def _prompt_logprobs(self, part: ScheduledSequence, logits: Tensor) -> PendingLogprobs:
        """Log-probabilities of the tokens that follow each of the step's rows within the prompt."""
        seq = part.seq
        first = max(part.start, seq.virtual)
        following = seq.tokens[first + 1 : min(part.end, seq.prompt_end - 1) + 1]
        top = seq.request.sampling.prompt_logprobs or 0
        ids = to_device(following, torch.int64, logits.device)
        return logprobs(logits[: len(following)], ids, [top] * len(following))

    def _sample(
        self, logits: Tensor, sampling: list[ScheduledSequence], masks: Mapping[int, MaskOrError]
    ) -> list[Callable[[], Mapping[int, TokenOrFault]]]:
        """Sample a token for each; returns functions that wait for them and map id(scheduled sequence) to it."""
        if not sampling:
            return []
        rows = [
            SamplingRow(
                params=part.seq.request.sampling,
                seed=part.seq.seed,
                position=part.end - part.seq.prompt_end,
                stop_ids=part.seq.stop_ids,
                prompt=part.seq.request.prompt,
                output=part.seq.tokens[part.seq.prompt_end : part.end],
                mask=mask if isinstance(mask := masks.get(id(part)), Tensor) else None,
            )
            for part in sampling
        ]
        try:
            samples = sample(logits, rows)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(rows) == 1:
                log.exception("sampling failed")
                failed = {id(sampling[0]): (None, None, _fault(error))}
                return [lambda: failed]
            return [each for i, one in enumerate(sampling) for each in self._sample(logits[i : i + 1], [one], masks)]
        if self._tokens is not None:
            start = self._tokens.write(samples.token_ids)
            for index, part in enumerate(sampling, start):
                part.seq.sampled_row = index
        return [lambda: _read(samples, sampling)]


def _read(samples: PendingSamples, sampling: list[ScheduledSequence]) -> dict[int, TokenOrFault]:
    """Wait for sampled tokens; by id of the scheduled sequence object."""
    sampled = samples.wait()
    return {
        id(part): (sampled.token_ids[i], sampled.logprobs[i], None)
        if sampled.finite[i]
        else (None, None, EngineFault("the model's output for this request is not finite"))
        for i, part in enumerate(sampling)
    }


def _fault(error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    if _out_of_memory(error):
        return Unavailable("the engine ran out of memory on this request", retry_after=1)
    return EngineFault("the engine failed on this request")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
