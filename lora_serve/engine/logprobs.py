"""Log-probabilities of given tokens and of each row's top-k, with an exactly summed normaliser.

Unnormalised probabilities are fixed-point integers (`exp` scaled by 2^40, in int64). Their sums are exact in any order,
so a result does not depend on a row's neighbours or on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import starmap

import torch
from torch import Tensor

from lora_serve.kernels.host_device_copy import DeviceToHostCopy
from lora_serve.request import Logprob

# The likeliest token's fixed-point probability. 2^23 ties still fit int64; one 2^40 times less likely rounds to 0.
PROB_SCALE = 2.0**40
ZERO_PROB = -40.0  # exp of it, scaled, is less than 1
CHUNK_LOGITS_CPU = 1 << 19  # logits processed at once: their int64 copies stay in a CPU's cache,
CHUNK_LOGITS_GPU = 1 << 24  # and are small beside the model's weights on a GPU


class PendingLogprobs:
    """Log-probabilities being copied to the host.

    Args:
        parts: chunks of rows: ids int64 [rows, 1 + k] (the given token, then the row's top k), their log-probabilities
            float32 [rows, 1 + k], and by row how many of the top k are wanted.
    """

    def __init__(self, parts: Iterable[tuple[Tensor, Tensor, Sequence[int]]]) -> None:
        self._parts = [(DeviceToHostCopy(ids), DeviceToHostCopy(values), tops) for ids, values, tops in parts]

    def wait(self) -> list[Logprob]:
        """Wait for the copies; returns one entry per row, in order."""
        return [
            entry
            for ids, values, tops in self._parts
            for entry in starmap(_entry, zip(ids.wait().tolist(), values.wait().tolist(), tops, strict=True))
        ]


def logprobs(logits: Tensor, token_ids: Tensor, tops: Sequence[int]) -> PendingLogprobs:
    """Log-probabilities of one token per row and of row i's `tops[i]` likeliest tokens (ties: lower id first).

    Args:
        logits: [rows, vocab], any float dtype. A row that is not finite gives NaN.
        token_ids: int64 [rows], on the same device.
    """
    parts = (slice(part[0], part[-1] + 1) for part in row_chunks(range(len(tops)), logits))
    return PendingLogprobs((*_logprobs(logits[part], token_ids[part], tops[part]), tops[part]) for part in parts)


def row_chunks(rows: Sequence[int], logits: Tensor) -> list[list[int]]:
    """Split rows into chunks that bound temporary memory; changes no result."""
    size = max(1, (CHUNK_LOGITS_CPU if logits.device.type == "cpu" else CHUNK_LOGITS_GPU) // logits.shape[1])
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def fixed_point_probs(shifted: Tensor) -> Tensor:
    """Unnormalised probabilities as int64, from logits minus their row's maximum (≤ 0), which maps to `PROB_SCALE`."""
    # Clamped where the result is 0 anyway: a CPU's exp is several times slower for -inf.
    return shifted.clamp(min=ZERO_PROB).exp_().mul_(PROB_SCALE).long()


def _logprobs(logits: Tensor, token_ids: Tensor, tops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of a chunk; see `PendingLogprobs`."""
    values = logits.float()
    peak = values.amax(-1, keepdim=True)
    log_total = (fixed_point_probs(values - peak).sum(-1, keepdim=True).double() / PROB_SCALE).log()
    k = min(max(tops, default=0), values.shape[1])
    ids = torch.cat([token_ids[:, None], _top_ids(values, k)], 1)
    result = ((values.gather(1, ids).double() - peak.double()) - log_total).float()
    return ids, result.where(peak.isfinite(), float("nan"))


def _entry(ids: list[int], values: list[float], top: int) -> Logprob:
    """Tokens at -inf are left out: they belong to a neighbouring row's larger vocabulary."""
    alternatives = zip(ids[1 : top + 1], values[1 : top + 1], strict=True)
    return Logprob(ids[0], values[0], [(id_, value) for id_, value in alternatives if value != -torch.inf])


def _top_ids(values: Tensor, count: int) -> Tensor:
    """Ids [rows, count] of the largest values, descending, ties by lower id; values float32 [rows, vocab]."""
    if count == 0:
        return values.new_empty(len(values), 0, dtype=torch.int64)
    if count == 1:
        return values.max(-1, keepdim=True).indices
    # One int64 sort key orders by value, then by id: a float's bits, read as an integer, order like the float if the
    # lower bits of negatives are flipped. Adding zero makes -0.0 equal to 0.0.
    bits = (values + 0.0).view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    order += torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return values.shape[1] - 1 - (order.topk(count).values & 0xFFFFFFFF)
