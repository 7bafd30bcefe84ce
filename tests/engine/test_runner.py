"""A failure ends only the sequence that caused it; the others' outputs are bit-identical."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.engine.runner import Runner, SequenceOutput
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.sequence import Sequence
from lora_serve.errors import EngineFault, Unavailable
from lora_serve.model.batch import Batch
from lora_serve.request import Request, Sampling

VOCABULARY = 32
EXPLODES, EXHAUSTS, POISONS = 20, 21, 22  # tokens with which a forward pass goes wrong


class Base:
    """A base whose next token is the last one plus one, and which fails on some tokens."""

    def forward(self, batch: Batch) -> Tensor:
        ids = torch.tensor(batch.token_ids)
        if EXPLODES in ids:
            raise ValueError("kaboom")
        if EXHAUSTS in ids:
            raise torch.OutOfMemoryError("no memory")
        logits = torch.nn.functional.one_hot(ids + 1, VOCABULARY).float()
        logits[ids == POISONS] = torch.nan
        return logits[batch.logits_rows]


def work(order: int, tokens: list[int]) -> ScheduledSequence:
    seq = Sequence(
        request=Request(str(order), tokens, Sampling(max_tokens=4, temperature=0.0)),
        order=order, adapters=(), seed=0, stop_ids=frozenset(), limit=9,
    )  # fmt: skip
    seq.blocks = [order + 1]
    return ScheduledSequence(seq, 0, len(tokens))


def run(*tokens: int) -> list[SequenceOutput]:
    runner = Runner(Base(), 4, torch.device("cpu"))  # type: ignore[arg-type]
    return runner.launch([work(order, [3, token]) for order, token in enumerate(tokens)], {})()()


def test_every_sequence_gets_its_own_next_token() -> None:
    assert [outcome.token for outcome in run(4, 9, 14)] == [5, 10, 15]


def test_an_exception_in_the_forward_pass_ends_only_the_culprit() -> None:
    first, culprit, last = run(4, EXPLODES, 14)
    assert (first.token, last.token) == (5, 15)
    assert isinstance(culprit.failure, EngineFault)
    assert "kaboom" not in culprit.failure.message


def test_out_of_memory_ends_the_sequence_with_a_retryable_error() -> None:
    culprit, other = run(EXHAUSTS, 4)
    assert isinstance(culprit.failure, Unavailable)
    assert culprit.failure.retry_after
    assert other.token == 5


def test_logits_that_are_not_finite_end_only_their_row() -> None:
    first, culprit = run(4, POISONS)
    assert first.token == 5
    assert culprit.token is None
    assert isinstance(culprit.failure, EngineFault)


def test_a_chunk_that_does_not_reach_the_end_of_the_prompt_samples_nothing() -> None:
    item = work(0, [3, 4, 5])
    runner = Runner(Base(), 4, torch.device("cpu"))  # type: ignore[arg-type]
    assert runner.launch([ScheduledSequence(item.seq, 0, 2)], {})()()[0].token is None


class ReusedLogits(Base):
    """A base that writes every pass's logits into the same memory, as replayed steps do."""

    def __init__(self) -> None:
        self.logits = torch.empty(9, VOCABULARY)

    def forward(self, batch: Batch) -> Tensor:
        found = super().forward(batch)
        self.logits[: len(found)] = found
        return self.logits[: len(found)]


def test_sequences_that_are_retried_one_by_one_keep_their_own_logits_until_all_are_sampled() -> None:
    runner = Runner(ReusedLogits(), 4, torch.device("cpu"))  # type: ignore[arg-type]
    parts = [work(order, [token]) for order, token in enumerate((4, EXPLODES, 14))]
    first, culprit, last = runner.launch(parts, {})()()
    assert (first.token, last.token) == (5, 15)
    assert culprit.failure is not None
