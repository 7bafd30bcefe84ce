"""Sampling for all rows of a step at once: logit bias, penalties, top-k, top-p and min-p filters, one token per row.

A row's token must not depend on its neighbours, on preemption or on the device. Therefore probabilities are fixed-point
integers (`exp` scaled by 2^40, in int64), whose sums are exact in any order of addition, and a row's random number is a
pure function of its seed and its position in the output. Filters are thresholds on a value, so tied tokens are kept or
dropped together and the order of a sort never matters.

Order of operations: logit_bias, no stop token before min_tokens, repetition penalty, presence and frequency penalties,
the grammar's mask, temperature, top_k, top_p, min_p, sampling. Temperature 0 takes the largest logit after the mask,
the lowest id among ties. Log-probabilities are the model's own: log-softmax of the logits as they came in.

Nothing here waits for the device: sampled tokens stay there until `PendingSamples.wait`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lora_serve.engine.logprobs import PROB_SCALE, PendingLogprobs, fixed_point_probs, logprobs, row_chunks
from lora_serve.kernels.host_device_copy import DeviceToHostCopy, to_device
from lora_serve.request import Logprob, Sampling

MIN_TEMPERATURE = 1e-5  # below it sampling is greedy: float32 could not tell such a temperature from 0
MAX_TOP_K = 1024  # a filter that keeps at most this many tokens needs no sort of the whole vocabulary
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingRow:
    """How to sample a token from one row of logits.

    Attributes:
        seed: any integer; always set (chosen at admission if the client gave none).
        position: tokens generated so far. The token depends on (seed, position) and the logits only.
        stop_ids: ids that are masked before `params.min_tokens`.
        prompt, output: token ids, for the penalties.
        mask: the tokens that a grammar allows, int32 [words], one bit per token; later tokens are not allowed. On the
            device of the logits.
    """

    params: Sampling
    seed: int
    position: int
    stop_ids: frozenset[int]
    prompt: Sequence[int]
    output: Sequence[int]
    mask: Tensor | None = None

    @property
    def greedy(self) -> bool:
        return self.params.temperature < MIN_TEMPERATURE

    @property
    def adjusted(self) -> bool:
        """Whether bias, masking or penalties change its logits."""
        params = self.params
        return (
            self.mask is not None
            or bool(params.logit_bias)
            or params.repetition_penalty != 1.0
            or (self.position < params.min_tokens and bool(self.stop_ids))
            or (bool(self.output) and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0))
        )


@dataclass(frozen=True)
class Samples:
    """Sampled tokens, one entry per row.

    `finite` is False where no token can be sampled: a logit is NaN or +Inf, or all are -Inf (in the input, or after
    masking). Such a row has token -1 and no log-probability; other rows are not affected.
    """

    token_ids: list[int]
    logprobs: list[Logprob | None]
    finite: list[bool]


class PendingSamples:
    """Tokens being sampled on the device.

    Attributes:
        token_ids: int64 [rows], on the device; -1 where no token can be sampled.

    Args:
        logprob_rows: rows whose log-probabilities are wanted.
        pending_logprobs: the log-probabilities of these rows; None if there are none.
    """

    def __init__(self, token_ids: Tensor, logprob_rows: list[int], pending_logprobs: PendingLogprobs | None) -> None:
        self.token_ids = token_ids
        self._tokens = DeviceToHostCopy(token_ids)
        self._logprob_rows, self._pending_logprobs = logprob_rows, pending_logprobs

    def wait(self) -> Samples:
        """Wait for the device; returns the sampled tokens."""
        token_ids: list[int] = self._tokens.wait().tolist()
        logprobs: list[Logprob | None] = [None] * len(token_ids)
        entries = [] if self._pending_logprobs is None else self._pending_logprobs.wait()
        for i, entry in zip(self._logprob_rows, entries, strict=True):
            logprobs[i] = entry if token_ids[i] >= 0 else None
        return Samples(token_ids, logprobs, [token >= 0 for token in token_ids])


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> PendingSamples:
    """Sample one token for each row.

    Args:
        logits: [rows, vocab], any float dtype; not modified, and not read after the next forward pass is launched.
    """
    token_ids = _argmax(logits)
    for part in row_chunks([i for i, row in enumerate(rows) if row.adjusted or not row.greedy], logits):
        sampled = _sample_rows(_rows(logits, part).to(torch.float32, copy=True), [rows[i] for i in part])
        _set_rows(token_ids, part, sampled.where(_rows(token_ids, part) >= 0, -1))
    logprob_rows = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not logprob_rows:
        return PendingSamples(token_ids, [], None)
    tops = [rows[i].params.logprobs or 0 for i in logprob_rows]
    pending = logprobs(_rows(logits, logprob_rows), _rows(token_ids, logprob_rows).clamp(min=0), tops)
    return PendingSamples(token_ids, logprob_rows, pending)


def uniform(seed: int, position: int) -> float:
    """A uniform random number in [0, 1): 53 bits of splitmix64 of seed and position (Steele, Lea, Flood 2014)."""
    return (_mix(_mix(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def _rows(x: Tensor, part: list[int]) -> Tensor:
    """x[part]; x itself, without a copy, if `part` (ascending) is all rows."""
    return x if len(part) == len(x) else x.index_select(0, to_device(part, torch.int64, x.device))


def _set_rows(x: Tensor, part: list[int], rows: Tensor) -> None:
    """x[part] = rows, for an ascending `part`."""
    if len(part) == len(x):
        x.copy_(rows)
    else:
        x.index_copy_(0, to_device(part, torch.int64, x.device), rows)


def _argmax(values: Tensor) -> Tensor:
    """Index int64 [rows] of each row's largest value, -1 if that is not finite (NaN counts as largest)."""
    largest = values.max(-1)
    return largest.indices.where(largest.values.isfinite(), -1)


def _sample_rows(values: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Sampled tokens int64 [rows], -1 where there is none. Modifies `values`, float32 [rows, vocab]."""
    for i, row in enumerate(rows):
        if row.adjusted:
            _adjust(values[i], row)
    masked = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
    if masked:
        _apply_masks(values, [i for i, _ in masked], torch.stack([mask for _, mask in masked]))
    tokens = _argmax(values)
    random = [i for i, row in enumerate(rows) if not row.greedy]
    if random:
        sampled = _sample_from_distribution(_rows(values, random), [rows[i] for i in random])
        _set_rows(tokens, random, sampled.where(_rows(tokens, random) >= 0, -1))
    return tokens


def _adjust(values: Tensor, row: SamplingRow) -> None:
    """Apply logit bias, masked stop tokens and penalties to one row, float32 [vocab], in place."""
    params = row.params
    device = values.device
    if params.logit_bias:
        ids = to_device(list(params.logit_bias), torch.int64, device)
        values[ids] += to_device(list(params.logit_bias.values()), torch.float32, device)
    if row.position < params.min_tokens:
        ids = to_device([token for token in row.stop_ids if token < len(values)], torch.int64, device)
        values.index_fill_(0, ids, float("-inf"))
    if params.repetition_penalty != 1.0:
        ids = to_device(list({*row.prompt, *row.output}), torch.int64, device)
        seen = values[ids]
        values[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if row.output and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
        counts = Counter(row.output)
        ids = to_device(list(counts), torch.int64, device)
        times = to_device(list(counts.values()), torch.float32, device)
        values[ids] -= params.presence_penalty + params.frequency_penalty * times


def _apply_masks(values: Tensor, part: list[int], masks: Tensor) -> None:
    """Set the logits of tokens that are not in a mask to -inf, for the rows `part`. Masks: int32 [len(part), words]."""
    added = _mask_table(masks.device).index_select(0, masks.view(torch.uint8).flatten().int()).view(len(masks), -1)
    rows = _rows(values, part)
    covered = min(added.shape[1], rows.shape[1])
    rows[:, :covered] += added[:, :covered]
    rows[:, covered:] = float("-inf")  # an adapter's own tokens
    if rows is not values:
        _set_rows(values, part, rows)


@cache
def _mask_table(device: torch.device) -> Tensor:
    """What each byte of a mask adds to 8 logits, float32 [256, 8]: 0 for allowed tokens, -inf for the others."""
    allowed = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return torch.where(allowed == 1, 0.0, float("-inf")).to(device)


def _sample_from_distribution(values: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Inverse-transform sampling from the filtered distribution. Values: float32 [rows, vocab], finite."""
    device = values.device
    temperature = to_device([row.params.temperature for row in rows], torch.float32, device)
    probs = fixed_point_probs((values - values.amax(-1, keepdim=True)) / temperature[:, None])
    _keep_top_k(probs, values, [row.params.top_k for row in rows])
    _keep_top_p(probs, [row.params.top_p for row in rows])
    _keep_min_p(probs, [row.params.min_p for row in rows])
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    u = to_device([uniform(row.seed, row.position) for row in rows], torch.float64, device)
    target = (u * total).long().minimum(total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _keep_top_k(probs: Tensor, values: Tensor, top_k: list[int]) -> None:
    """Drop tokens with k or more likelier ones."""
    filtered = [i for i, k in enumerate(top_k) if 0 < k < values.shape[1]]
    for part in ([i for i in filtered if top_k[i] <= MAX_TOP_K], [i for i in filtered if top_k[i] > MAX_TOP_K]):
        if part:
            filtered_values = _rows(values, part)
            last = to_device([top_k[i] - 1 for i in part], torch.int64, values.device)
            largest = filtered_values.topk(max(top_k[i] for i in part)).values
            _set_rows(probs, part, _rows(probs, part).where(filtered_values >= largest.gather(1, last[:, None]), 0))


def _keep_top_p(probs: Tensor, top_p: list[float]) -> None:
    """Drop tokens whose likelier ones already have a total probability of p or more."""
    filtered = [i for i, p in enumerate(top_p) if p < 1.0]
    if not filtered:
        return
    rows = _rows(probs, filtered)
    mass = to_device([top_p[i] for i in filtered], torch.float64, probs.device) * rows.sum(-1)
    threshold = (_threshold_by_top_k if probs.device.type == "cpu" else _threshold_by_sorting)(rows, mass)
    _set_rows(probs, filtered, rows.where(rows >= threshold[:, None], 0))


def _threshold_by_sorting(probs: Tensor, mass: Tensor) -> Tensor:
    """Smallest probability [rows] in the nucleus: the fewest tokens whose sum reaches `mass` [rows]."""
    return _threshold(probs.sort(descending=True).values, mass)


def _threshold_by_top_k(probs: Tensor, mass: Tensor) -> Tensor:
    """The same, sorting only rows with a wide nucleus; for a CPU, because the host has to know which rows these are."""
    head = probs.topk(min(MAX_TOP_K, probs.shape[1])).values
    threshold = _threshold(head, mass)
    wide = (head.sum(-1) < mass).nonzero()[:, 0]
    if len(wide):
        threshold[wide] = _threshold_by_sorting(probs[wide], mass[wide])
    return threshold


def _threshold(descending: Tensor, mass: Tensor) -> Tensor:
    """Smallest probability [rows] in the nucleus, which has at least one token; `descending` is sorted."""
    before = descending.cumsum(-1) - descending
    count = (before < mass[:, None]).sum(-1).clamp(min=1)
    return descending.gather(1, count[:, None] - 1)[:, 0]


def _keep_min_p(probs: Tensor, min_p: list[float]) -> None:
    """Drop tokens less likely than min_p times the likeliest, which has `PROB_SCALE`."""
    filtered = [i for i, p in enumerate(min_p) if p > 0.0]
    if filtered:
        threshold = to_device([min_p[i] * PROB_SCALE for i in filtered], torch.float64, probs.device)
        rows = _rows(probs, filtered)
        _set_rows(probs, filtered, rows.where(rows >= threshold.long()[:, None], 0))
