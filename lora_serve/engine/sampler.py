"""Logits to tokens: biases, penalties, filters and the draw, for all rows of a step at once.

Why it is written as it is: a row's result must not depend on its neighbours, on preemption or on the device. Therefore
probabilities are whole numbers (`exp` scaled by 2^40, in int64), whose sums are exact in whatever order a backend adds
them, and the random number of a draw is a pure function of the row's seed and its position in the output. Filters
are written as thresholds on a value, so equal values always share one fate and no order of sorting shows.

The order of what is done to a row: logit_bias, no stop token before min_tokens, repetition penalty, presence and
frequency penalties, temperature, top_k, top_p, min_p, draw. Temperature 0 takes the largest logit after the
penalties, the lowest id among equals. Log-probabilities are those of the model itself: log-softmax of the logits
as they came in.

Nothing waits for the device: what it draws stays there as a tensor, and is read when it is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.engine.logprobs import ONE, PendingLogprobs, chunks, logprobs
from lora_serve.engine.logprobs import weights as weights_of
from lora_serve.kernels.host_device_copy import DeviceToHostCopy, to_device
from lora_serve.request import Logprob, Sampling

COLDEST = 1e-5  # temperatures below it are greedy; float32 could not tell them apart from 0
NEAR = 1024  # a filter that keeps no more tokens than this is found without sorting the vocabulary
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits to draw a token from.

    Attributes:
        seed: any integer; always set (drawn at admission if the client gave none).
        position: tokens generated so far. The draw depends on (seed, position) and the logits, on nothing else.
        stop_ids: ids that are forbidden before `params.min_tokens`.
        prompt, output: token ids; read for penalties only.
    """

    params: Sampling
    seed: int
    position: int
    stop_ids: frozenset[int]
    prompt: Sequence[int]
    output: Sequence[int]

    @property
    def greedy(self) -> bool:
        return self.params.temperature < COLDEST

    @property
    def adjusted(self) -> bool:
        """Whether its logits are changed before a token is chosen."""
        params = self.params
        return (
            bool(params.logit_bias)
            or params.repetition_penalty != 1.0
            or (self.position < params.min_tokens and bool(self.stop_ids))
            or (bool(self.output) and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0))
        )


@dataclass(frozen=True)
class Sampled:
    """One entry a row.

    `finite` is False where nothing can be drawn: a logit is NaN or +Inf, or every one is -Inf (in the input, or after
    masking). Such a row has token -1 and no log-probability, and changes nothing for the others.
    """

    token_ids: list[int]
    logprobs: list[Logprob | None]
    finite: list[bool]


class PendingSamples:
    """A step's tokens as the device draws them.

    Attributes:
        token_ids: int64 [rows], on the device; -1 where nothing can be drawn.

    Args:
        wanted, listed: the rows whose log-probabilities are wanted, and these; None if there are none.
    """

    def __init__(self, token_ids: Tensor, wanted: list[int], listed: PendingLogprobs | None) -> None:
        self.token_ids = token_ids
        self._tokens = DeviceToHostCopy(token_ids)
        self._wanted, self._listed = wanted, listed

    def wait(self) -> Sampled:
        """What was drawn, once the device is that far."""
        token_ids: list[int] = self._tokens.wait().tolist()
        found: list[Logprob | None] = [None] * len(token_ids)
        for i, entry in zip(self._wanted, [] if self._listed is None else self._listed.wait(), strict=True):
            found[i] = entry if token_ids[i] >= 0 else None
        return Sampled(token_ids, found, [token >= 0 for token in token_ids])


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> PendingSamples:
    """Choose one token for each row.

    Args:
        logits: [rows, vocab], any float dtype; not changed, and not read any more once the next pass is launched.
    """
    token_ids = _argmax(logits)
    for part in chunks([i for i, row in enumerate(rows) if row.adjusted or not row.greedy], logits):
        chosen = _choose(_rows(logits, part).to(torch.float32, copy=True), [rows[i] for i in part])
        _put(token_ids, part, chosen.where(_rows(token_ids, part) >= 0, -1))
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    tops = [rows[i].params.logprobs or 0 for i in wanted]
    listed = logprobs(_rows(logits, wanted), _rows(token_ids, wanted).clamp(min=0), tops) if wanted else None
    return PendingSamples(token_ids, wanted, listed)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a draw: 53 bits of splitmix64 over both (Steele, Lea, Flood 2014)."""
    return (_mix(_mix(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def _rows(x: Tensor, part: list[int]) -> Tensor:
    """The rows `part` (ascending) of x; x itself where that is all of them."""
    return x if len(part) == len(x) else x.index_select(0, to_device(part, torch.int64, x.device))


def _put(x: Tensor, part: list[int], rows: Tensor) -> None:
    """x[part] = rows; `part` as in `_rows`."""
    if len(part) == len(x):
        x.copy_(rows)
    else:
        x.index_copy_(0, to_device(part, torch.int64, x.device), rows)


def _argmax(values: Tensor) -> Tensor:
    """Index int64 [rows] of the largest value a row, -1 if that is not finite (NaN counts as largest)."""
    largest = values.max(-1)
    return largest.indices.where(largest.values.isfinite(), -1)


def _choose(values: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Token [rows], -1 where there is none to choose. ModuleOverrides `values`, float32 [rows, vocab]."""
    for i, row in enumerate(rows):
        if row.adjusted:
            _adjust(values[i], row)
    tokens = _argmax(values)
    drawing = [i for i, row in enumerate(rows) if not row.greedy]
    if drawing:
        drawn = _draw(_rows(values, drawing), [rows[i] for i in drawing])
        _put(tokens, drawing, drawn.where(_rows(tokens, drawing) >= 0, -1))
    return tokens


def _adjust(values: Tensor, row: SamplingRow) -> None:
    """Bias, forbidden stop tokens and penalties on one row, float32 [vocab], in place."""
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


def _draw(values: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Invert the filtered distribution's cumulative sum, over ids in order. Values: float32 [rows, vocab], finite."""
    device = values.device
    temperature = to_device([row.params.temperature for row in rows], torch.float32, device)
    weights = weights_of((values - values.amax(-1, keepdim=True)) / temperature[:, None])
    _keep_top_k(weights, values, [row.params.top_k for row in rows])
    _keep_top_p(weights, [row.params.top_p for row in rows])
    _keep_min_p(weights, [row.params.min_p for row in rows])
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    draws = to_device([uniform(row.seed, row.position) for row in rows], torch.float64, device)
    target = (draws * total).long().minimum(total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _keep_top_k(weights: Tensor, values: Tensor, top_k: list[int]) -> None:
    """Drop tokens that k or more others surpass."""
    filtered = [i for i, k in enumerate(top_k) if 0 < k < values.shape[1]]
    for part in ([i for i in filtered if top_k[i] <= NEAR], [i for i in filtered if top_k[i] > NEAR]):
        if part:
            chosen = _rows(values, part)
            last = to_device([top_k[i] - 1 for i in part], torch.int64, values.device)
            largest = chosen.topk(max(top_k[i] for i in part)).values
            _put(weights, part, _rows(weights, part).where(chosen >= largest.gather(1, last[:, None]), 0))


def _keep_top_p(weights: Tensor, top_p: list[float]) -> None:
    """Drop tokens where those that surpass them already hold the probability p or more."""
    filtered = [i for i, p in enumerate(top_p) if p < 1.0]
    if not filtered:
        return
    chosen = _rows(weights, filtered)
    share = to_device([top_p[i] for i in filtered], torch.float64, weights.device) * chosen.sum(-1)
    least = (_least_by_parts if weights.device.type == "cpu" else _least_by_sorting)(chosen, share)
    _put(weights, filtered, chosen.where(chosen >= least[:, None], 0))


def _least_by_sorting(weights: Tensor, share: Tensor) -> Tensor:
    """Smallest weight [rows] among the fewest that reach `share`."""
    return _least_of_share(weights.sort(descending=True).values, share)


def _least_by_parts(weights: Tensor, share: Tensor) -> Tensor:
    """The same, sorting only the rows that need it: how many these are has to be waited for."""
    head = weights.topk(min(NEAR, weights.shape[1])).values
    least = _least_of_share(head, share)
    wide = (head.sum(-1) < share).nonzero()[:, 0]
    if len(wide):
        least[wide] = _least_by_sorting(weights[wide], share[wide])
    return least


def _least_of_share(descending: Tensor, share: Tensor) -> Tensor:
    """Smallest weight [rows] among the fewest that reach `share`; at least the largest one."""
    before = descending.cumsum(-1) - descending
    count = (before < share[:, None]).sum(-1).clamp(min=1)
    return descending.gather(1, count[:, None] - 1)[:, 0]


def _keep_min_p(weights: Tensor, min_p: list[float]) -> None:
    """Drop tokens less likely than min_p times the likeliest, whose weight is `ONE`."""
    filtered = [i for i, p in enumerate(min_p) if p > 0.0]
    if filtered:
        least = to_device([min_p[i] * ONE for i in filtered], torch.float64, weights.device)
        chosen = _rows(weights, filtered)
        _put(weights, filtered, chosen.where(chosen >= least.long()[:, None], 0))
