"""Which rows are pooled, and sums over the chunks of a prompt."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from lora_serve.adapters.traits import Traits
from lora_serve.engine.pooling import EmbeddingSums, pooled_positions
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.sequence import Sequence
from lora_serve.request import EmbeddingParams, Pooling, Request, Sampling, Served

VIRTUAL, TOKENS = 2, 5


def sequence(mode: Literal["mean", "first", "last"] | None, dimensions: int | None = None) -> Sequence:
    return Sequence(
        request=Request("r", [7] * TOKENS, Sampling(max_tokens=0), embedding=EmbeddingParams(dimensions)),
        order=0, adapters=(Served("a", "digest", 1.0),), seed=0, stop_ids=frozenset(), limit=VIRTUAL + TOKENS,
        traits={"digest": Traits(virtual=VIRTUAL)}, pooling=None if mode is None else Pooling(mode, normalize=False),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [("mean", [[2], [3, 4, 5], [6]]), ("first", [[2], [], []]), ("last", [[], [], [6]]), (None, [[], [], []])],
)
def test_virtual_tokens_are_not_pooled(mode: Literal["mean", "first", "last"] | None, wanted: list[list[int]]) -> None:
    seq = sequence(mode)
    parts = [ScheduledSequence(seq, start, count) for start, count in ((0, 3), (3, 3), (6, 1))]
    assert [[*pooled_positions(part)] for part in parts] == wanted


def test_a_mean_starts_anew_with_the_first_chunk() -> None:
    sums, seq = EmbeddingSums(), sequence("mean")
    for start, count, total in ((0, 4, 100.0), (0, 4, 1.0), (4, 3, 2.0)):  # preempted after the first
        sums.add(ScheduledSequence(seq, start, count), torch.tensor([total, -total]))
    vector = sums.embedding(seq)
    assert vector is not None
    assert torch.frombuffer(bytearray(vector), dtype=torch.float32).tolist() == pytest.approx([0.6, -0.6])
    assert repr(sums) == "<EmbeddingSums of 1 sequences>"
    sums.discard(seq)
    assert repr(sums) == "<EmbeddingSums of 0 sequences>"


def test_an_embedding_that_is_not_finite_is_none_and_zeros_stay_zeros() -> None:
    sums, seq = EmbeddingSums(), sequence("last", dimensions=1)
    sums.add(ScheduledSequence(seq, 0, 7), torch.tensor([torch.nan, 1.0]))
    assert sums.embedding(seq) is None
    sums.add(ScheduledSequence(seq, 0, 7), torch.tensor([0.0, 1.0]))
    assert sums.embedding(seq) == bytes(4)
