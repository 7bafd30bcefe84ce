"""Results of `asample`, in protobuf."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_serve.api.tinker.protobuf_messages import LENGTH, STOP, SampleResponse
from lora_serve.request import Logprob

NO_TOKEN, NO_LOGPROB = 0, -99999.0  # where there is no alternative


class SampleOutput(NamedTuple):
    """One generated sequence: all its tokens, those that ended it among them, and why it ended."""

    tokens: Sequence[int]
    logprobs: Sequence[Logprob]
    stopped: bool


def encode_samples(
    samples: Sequence[SampleOutput],
    *,
    top: int = 0,
    prompt: Sequence[Logprob | None] | None = None,
    prompt_top: int = 0,
    last: int | None = None,
    cached: int = 0,
) -> bytes:
    """A `SampleResponse`.

    Args:
        top, prompt_top: how many alternatives each generated token, and each of the prompt's, is to have.
        prompt: log-probabilities of the prompt's tokens, if they were asked for; None is the first token's.
        last: only of so many last tokens of the prompt.
        cached: tokens of the prompt that were found in the prefix cache.
    """
    response = SampleResponse(prompt_cache_hit_tokens=cached)
    for sample in samples:
        sequence = response.sequences.add(stop_reason=STOP if sample.stopped else LENGTH)
        sequence.tokens = array("i", sample.tokens).tobytes()
        sequence.logprobs = array("f", [each.value for each in sample.logprobs]).tobytes()
        if top:
            _set_top(sequence.topk_sampled_logprobs, sample.logprobs, top)
    if prompt is not None:
        first = 0 if last is None else max(0, len(prompt) - last)
        shown = [entry if place >= first else None for place, entry in enumerate(prompt)]
        response.prompt_logprobs = array("f", [math.nan if each is None else each.value for each in shown]).tobytes()
        if prompt_top:
            _set_top(response.topk_prompt_logprobs, shown, prompt_top)
    encoded: bytes = response.SerializeToString()
    return encoded


def _set_top(message: Any, entries: Sequence[Logprob | None], k: int) -> None:
    """Fill in a `TopkLogprobs`: a row of k for each entry."""
    rows = [([] if each is None else each.top[:k]) for each in entries]
    filled = [row + [(NO_TOKEN, NO_LOGPROB)] * (k - len(row)) for row in rows]
    message.token_ids = array("i", [token for row in filled for token, _ in row]).tobytes()
    message.logprobs = array("f", [value for row in filled for _, value in row]).tobytes()
    message.k, message.length = k, len(rows)
