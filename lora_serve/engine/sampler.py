"""Logits to tokens: biases, penalties, filters and the draw, for all rows of a step at once.

Why it is written as it is: a row's result must not depend on its neighbours, on preemption or on the device. Therefore
probabilities are whole numbers (`exp` scaled by 2^40, in int64), whose sums are exact in whatever order a backend adds
them, and the random number of a draw is a pure function of the row's seed and its position in the output. Filters
are written as thresholds on a value, so equal values always share one fate and no order of sorting shows.

The order of what is done to a row: logit_bias, no stop token before min_tokens, repetition penalty, presence and
frequency penalties, temperature, top_k, top_p, min_p, draw. Temperature 0 takes the largest logit after the
penalties, the lowest id among equals. Log-probabilities are those of the model itself: log-softmax of the logits
as they came in.

Grammars are not here: what they forbid is masked before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

import torch
from torch import Tensor

from lora_serve.request import Logprob, Sampling

COLDEST = 1e-5  # temperatures below it are greedy; float32 could not tell them apart from 0
ONE = 2.0**40  # weight of the likeliest token; 2^23 tokens as likely still fit int64; 2^40 times less likely is never
NEAR = 1024  # a filter that keeps no more tokens than this is found without sorting the vocabulary
CHUNK_CPU = 1 << 19  # logits treated at once: their int64 copies stay in a CPU's cache,
CHUNK_DEVICE = 1 << 24  # and are small beside the weights elsewhere
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Row:
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


def sample(logits: Tensor, rows: Sequence[Row]) -> Sampled:
    """Choose one token for each row.

    Args:
        logits: [rows, vocab], any float dtype; not changed.
    """
    token_ids, finite = _argmax(logits)
    special = [i for i, row in enumerate(rows) if finite[i] and (row.adjusted or not row.greedy)]
    for part in _chunks(special, logits):
        values = logits[part].float()
        chosen, possible = _choose(values, [rows[i] for i in part])
        for i, token, ok in zip(part, chosen, possible, strict=True):
            token_ids[i], finite[i] = (token, True) if ok else (-1, False)
    logprobs: list[Logprob | None] = [None] * len(rows)
    wanted = [i for i, row in enumerate(rows) if finite[i] and row.params.logprobs is not None]
    for part in _chunks(wanted, logits):
        tops = [rows[i].params.logprobs or 0 for i in part]
        for i, entry in zip(part, _logprobs(logits[part], [token_ids[i] for i in part], tops), strict=True):
            logprobs[i] = entry
    return Sampled(token_ids, logprobs, finite)


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[Logprob]:
    """Log-probabilities of given tokens, and of the `top` likeliest ones in their places (equals: lower id first).

    Args:
        logits: [tokens, vocab], any float dtype; row i predicts token_ids[i]. A row that is not finite gives NaN.
    """
    found: list[Logprob] = []
    for part in _chunks(range(len(token_ids)), logits):
        place = slice(part[0], part[-1] + 1)
        found += _logprobs(logits[place], token_ids[place], [top] * len(part))
    return found


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a draw: 53 bits of splitmix64 over both (Steele, Lea, Flood 2014)."""
    return (_mix(_mix(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def _chunks(rows: Sequence[int], logits: Tensor) -> list[list[int]]:
    """The rows in parts that are treated at once; changes no result."""
    size = max(1, (CHUNK_CPU if logits.device.type == "cpu" else CHUNK_DEVICE) // logits.shape[1])
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _argmax(values: Tensor) -> tuple[list[int], list[bool]]:
    """Index of the largest value a row, -1 if the row is not finite (NaN counts as largest), and whether it is."""
    largest = values.max(-1)
    tokens: list[int] = largest.indices.where(largest.values.isfinite(), -1).tolist()
    return tokens, [token >= 0 for token in tokens]


def _choose(values: Tensor, rows: list[Row]) -> tuple[list[int], list[bool]]:
    """Token a row, and whether there was one to choose. Changes `values`, float32 [rows, vocab]."""
    for i, row in enumerate(rows):
        if row.adjusted:
            _adjust(values[i], row)
    tokens, possible = _argmax(values)
    drawing = [i for i, row in enumerate(rows) if possible[i] and not row.greedy]
    if drawing:
        if len(drawing) < len(rows):
            values = values[drawing]
        for i, token in zip(drawing, _draw(values, [rows[i] for i in drawing]), strict=True):
            tokens[i] = token
    return tokens, possible


def _adjust(values: Tensor, row: Row) -> None:
    """Bias, forbidden stop tokens and penalties on one row, float32 [vocab], in place."""
    params = row.params
    device = values.device
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        values[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
    if row.position < params.min_tokens:
        ids = torch.tensor([token for token in row.stop_ids if token < len(values)], dtype=torch.int64, device=device)
        values[ids] = float("-inf")
    if params.repetition_penalty != 1.0:
        ids = torch.tensor(list({*row.prompt, *row.output}), dtype=torch.int64, device=device)
        seen = values[ids]
        values[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if row.output and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
        counts = Counter(row.output)
        ids = torch.tensor(list(counts), dtype=torch.int64, device=device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)
        values[ids] -= params.presence_penalty + params.frequency_penalty * times


def _draw(values: Tensor, rows: list[Row]) -> list[int]:
    """Invert the filtered distribution's cumulative sum, over ids in order. Values: finite float32 [rows, vocab]."""
    device = values.device
    temperature = torch.tensor([row.params.temperature for row in rows], device=device)
    weights = _weights((values - values.amax(-1, keepdim=True)) / temperature[:, None])
    _keep_top_k(weights, values, [row.params.top_k for row in rows])
    _keep_top_p(weights, [row.params.top_p for row in rows])
    _keep_min_p(weights, [row.params.min_p for row in rows])
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    draws = torch.tensor([uniform(row.seed, row.position) for row in rows], dtype=torch.float64, device=device)
    target = (draws * total).long().minimum(total - 1)
    tokens: list[int] = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].tolist()
    return tokens


def _weights(distance: Tensor) -> Tensor:
    """Probabilities up to a factor, as int64, from distances to the largest logit (≤ 0): that one weighs `ONE`."""
    return distance.exp().mul_(ONE).long()


def _keep_top_k(weights: Tensor, values: Tensor, top_k: list[int]) -> None:
    """Drop tokens that k or more others surpass."""
    filtered = [i for i, k in enumerate(top_k) if 0 < k < values.shape[1]]
    for part in ([i for i in filtered if top_k[i] <= NEAR], [i for i in filtered if top_k[i] > NEAR]):
        if part:
            chosen = values[part]
            last = torch.tensor([top_k[i] - 1 for i in part], device=values.device)
            largest = chosen.topk(max(top_k[i] for i in part)).values
            weights[part] = weights[part].where(chosen >= largest.gather(1, last[:, None]), 0)


def _keep_top_p(weights: Tensor, top_p: list[float]) -> None:
    """Drop tokens where those that surpass them already hold the probability p or more."""
    filtered = [i for i, p in enumerate(top_p) if p < 1.0]
    if not filtered:
        return
    chosen = weights[filtered]
    share = torch.tensor([top_p[i] for i in filtered], dtype=torch.float64, device=weights.device) * chosen.sum(-1)
    head = chosen.topk(min(NEAR, chosen.shape[1])).values
    least = _least_of_share(head, share)
    wide = (head.sum(-1) < share).nonzero()[:, 0]
    if len(wide):
        least[wide] = _least_of_share(chosen[wide].sort(descending=True).values, share[wide])
    weights[filtered] = chosen.where(chosen >= least[:, None], 0)


def _least_of_share(descending: Tensor, share: Tensor) -> Tensor:
    """Smallest weight [rows] among the fewest that reach `share`; at least the largest one."""
    before = descending.cumsum(-1) - descending
    count = (before < share[:, None]).sum(-1).clamp(min=1)
    return descending.gather(1, count[:, None] - 1)[:, 0]


def _keep_min_p(weights: Tensor, min_p: list[float]) -> None:
    """Drop tokens less likely than min_p times the likeliest, whose weight is `ONE`."""
    filtered = [i for i, p in enumerate(min_p) if p > 0.0]
    if filtered:
        least = torch.tensor([min_p[i] * ONE for i in filtered], dtype=torch.float64, device=weights.device)
        chosen = weights[filtered]
        weights[filtered] = chosen.where(chosen >= least.long()[:, None], 0)


def _logprobs(logits: Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[Logprob]:
    """Log-probability of a token a row and of its row's likeliest `tops[i]`; logits [rows, vocab], any float dtype."""
    values = logits.float()
    peak = values.amax(-1, keepdim=True)
    log_total = (_weights(values - peak).sum(-1, keepdim=True).double() / ONE).log()
    most = min(max(tops, default=0), values.shape[1])
    tokens = torch.tensor(token_ids, dtype=torch.int64, device=values.device)[:, None]
    ids = torch.cat([tokens, _likeliest(values, most)], 1)
    found = ((values.gather(1, ids).double() - peak.double()) - log_total).float()
    found = found.where(peak.isfinite(), float("nan"))
    return list(starmap(_entry, zip(ids.tolist(), found.tolist(), tops, strict=True)))


def _entry(ids: list[int], values: list[float], top: int) -> Logprob:
    """What is -inf is not in the row's vocabulary: a neighbour's is larger."""
    likeliest = zip(ids[1 : top + 1], values[1 : top + 1], strict=True)
    return Logprob(ids[0], values[0], [(id_, value) for id_, value in likeliest if value != -torch.inf])


def _likeliest(values: Tensor, count: int) -> Tensor:
    """Ids [rows, count] of the largest values, descending, equals by lower id; values float32 [rows, vocab]."""
    if count == 0:
        return values.new_empty(len(values), 0, dtype=torch.int64)
    if count == 1:
        return values.max(-1, keepdim=True).indices
    # One whole number orders by value, then by id: a float's bits, read as an integer, order like the float if the
    # lower ones of negatives are flipped. Adding zero makes -0.0 equal to 0.0.
    bits = (values + 0.0).view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    order += torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return values.shape[1] - 1 - (order.topk(count).values & 0xFFFFFFFF)
