"""Log-probabilities of tokens and of their likeliest rivals, by whole-number sums that no backend's order changes.

A weight is a probability up to a factor, as a whole number (`exp` scaled by 2^40, in int64): sums of them are exact, so
what is found does not depend on a row's neighbours or on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import starmap

import torch
from torch import Tensor

from lora_serve.kernels.host_device_copy import DeviceToHostCopy
from lora_serve.request import Logprob

ONE = 2.0**40  # weight of the likeliest token; 2^23 tokens as likely still fit int64; 2^40 times less likely is never
CHUNK_CPU = 1 << 19  # logits treated at once: their int64 copies stay in a CPU's cache,
CHUNK_DEVICE = 1 << 24  # and are small beside the weights elsewhere


class PendingLogprobs:
    """Log-probabilities on their way to the host.

    Args:
        parts: by some rows at a time, ids int64 [rows, 1 + most] (the token itself, then the row's likeliest ones),
            their log-probabilities float32, and how many of the likeliest are wanted, by row.
    """

    def __init__(self, parts: Iterable[tuple[Tensor, Tensor, Sequence[int]]]) -> None:
        self._parts = [(DeviceToHostCopy(ids), DeviceToHostCopy(values), tops) for ids, values, tops in parts]

    def wait(self) -> list[Logprob]:
        """One entry a row, in order."""
        return [
            entry
            for ids, values, tops in self._parts
            for entry in starmap(_entry, zip(ids.wait().tolist(), values.wait().tolist(), tops, strict=True))
        ]


def logprobs(logits: Tensor, token_ids: Tensor, tops: Sequence[int]) -> PendingLogprobs:
    """Log-probabilities of a token a row, and of its row's `tops[i]` likeliest ones (equals: lower id first).

    Args:
        logits: [rows, vocab], any float dtype. A row that is not finite gives NaN.
        token_ids: int64 [rows], on the same device.
    """
    parts = (slice(part[0], part[-1] + 1) for part in chunks(range(len(tops)), logits))
    return PendingLogprobs((*_logprobs(logits[part], token_ids[part], tops[part]), tops[part]) for part in parts)


def chunks(rows: Sequence[int], logits: Tensor) -> list[list[int]]:
    """The rows in parts that are treated at once; changes no result."""
    size = max(1, (CHUNK_CPU if logits.device.type == "cpu" else CHUNK_DEVICE) // logits.shape[1])
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def weights(distance: Tensor) -> Tensor:
    """Probabilities up to a factor, as int64, from distances to the largest logit (≤ 0): that one weighs `ONE`."""
    return distance.exp().mul_(ONE).long()


def _logprobs(logits: Tensor, token_ids: Tensor, tops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids and values as `PendingLogprobs` wants them."""
    values = logits.float()
    peak = values.amax(-1, keepdim=True)
    log_total = (weights(values - peak).sum(-1, keepdim=True).double() / ONE).log()
    most = min(max(tops, default=0), values.shape[1])
    ids = torch.cat([token_ids[:, None], _likeliest(values, most)], 1)
    found = ((values.gather(1, ids).double() - peak.double()) - log_total).float()
    found = found.where(peak.isfinite(), float("nan"))
    return ids, found


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
