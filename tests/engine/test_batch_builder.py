"""Batches of scheduled sequences: which rows use which adapter, which are virtual, whose logits are wanted."""

from __future__ import annotations

from lora_serve.adapters.traits import Traits
from lora_serve.engine.batch_builder import build_batch
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.sequence import Sequence
from lora_serve.model.batch import AdapterRows, Batch
from lora_serve.request import Request, Sampling, Served

SLOTS = {"a": 1, "b": 2, "prefix": 3, "replacing": 4}
TRAITS = {
    "a": Traits(invocation=(7, 8)),
    "b": Traits(),
    "prefix": Traits(virtual=5),
    "replacing": Traits(invocation=(7, 8), not_additive="it replaces parts of the base"),
}


def sequence(prompt: list[int], *digests: str, logprobs: bool = False) -> Sequence:
    seq = Sequence(
        request=Request("r", prompt, Sampling(max_tokens=4, prompt_logprobs=0 if logprobs else None)),
        order=0,
        adapters=tuple(Served(digest, digest, 1.0) for digest in digests),
        seed=0,
        stop_ids=frozenset(),
        limit=99,
        traits={digest: TRAITS[digest] for digest in digests},
    )
    seq.blocks = list(range(1, 10))
    return seq


def build(*work: ScheduledSequence) -> Batch:
    return build_batch(list(work), SLOTS, 4)[0]


def test_rows_of_one_adapter_are_one_segment_for_any_number_of_sequences() -> None:
    base, one, two = sequence([1, 2, 3]), sequence([4, 5], "b"), sequence([6, 6, 6], "b")
    batch = build(ScheduledSequence(one, 0, 2), ScheduledSequence(base, 0, 3), ScheduledSequence(two, 0, 3))
    assert batch.adapter_rows == [AdapterRows(3, 8, 2, 1.0)]
    assert batch.logits_adapter_rows == [AdapterRows(1, 3, 2, 1.0)]


def test_a_sequence_is_split_where_an_adapter_becomes_active() -> None:
    seq = sequence([1, 2, 7, 8, 3, 4], "a", logprobs=True)
    assert build(ScheduledSequence(seq, 0, 6)).adapter_rows == [AdapterRows(2, 6, 1, 1.0)]
    assert build(ScheduledSequence(seq, 0, 6)).logits_adapter_rows == [AdapterRows(2, 6, 1, 1.0)]
    assert build(ScheduledSequence(seq, 0, 2)).adapter_rows == []
    assert build(ScheduledSequence(seq, 2, 2)).adapter_rows == [AdapterRows(0, 2, 1, 1.0)]
    assert build(ScheduledSequence(sequence([1, 2, 3], "a"), 0, 3)).adapter_rows == []  # never invoked


def test_rows_before_an_invocation_have_an_adapter_that_replaces_parts_of_the_base_at_weight_0() -> None:
    seq = sequence([1, 2, 7, 8, 3, 4], "replacing")
    assert build(ScheduledSequence(seq, 0, 6)).adapter_rows == [AdapterRows(0, 2, 4, 0.0), AdapterRows(2, 6, 4, 1.0)]
    assert build(ScheduledSequence(seq, 2, 2)).adapter_rows == [AdapterRows(0, 2, 4, 1.0)]
    never = sequence([1, 2, 3], "replacing")
    assert build(ScheduledSequence(never, 0, 3)).adapter_rows == [AdapterRows(0, 3, 4, 0.0)]
    assert build(ScheduledSequence(never, 0, 3)).logits_adapter_rows == [AdapterRows(0, 1, 4, 0.0)]


def test_each_adapter_of_a_composition_starts_at_its_own_position() -> None:
    batch = build(ScheduledSequence(sequence([1, 7, 8, 3], "b", "a"), 0, 4))
    assert batch.adapter_rows == [AdapterRows(0, 1, 2, 1.0), AdapterRows(1, 4, 1, 1.0), AdapterRows(1, 4, 2, 1.0)]
    assert batch.logits_adapter_rows == [AdapterRows(0, 1, 1, 1.0), AdapterRows(0, 1, 2, 1.0)]


def test_virtual_rows_are_listed_and_have_no_token_and_no_logits() -> None:
    seq = sequence([6, 7], "prefix", logprobs=True)
    whole = build(ScheduledSequence(sequence([9]), 0, 1), ScheduledSequence(seq, 0, 7))
    assert whole.token_ids == [9, 0, 0, 0, 0, 0, 6, 7]
    assert whole.positions == [0, 0, 1, 2, 3, 4, 5, 6]
    assert whole.virtual_rows == [AdapterRows(1, 6, 3, first=0)]
    assert whole.logits_rows == [0, 6, 7]
    assert whole.adapter_rows == [AdapterRows(1, 8, 3, 1.0)]
    middle = build(ScheduledSequence(seq, 2, 2))
    assert middle.virtual_rows == [AdapterRows(0, 2, 3, first=2)]
    assert middle.logits_rows == []
    rest = build(ScheduledSequence(seq, 4, 3))
    assert (rest.virtual_rows, rest.token_ids) == ([AdapterRows(0, 1, 3, first=4)], [0, 6, 7])
    assert build(ScheduledSequence(seq, 5, 2)).virtual_rows == []
