"""A step as flat tensors: which rows get which adapter, which are virtual, whose logits are wanted."""

from __future__ import annotations

from lora_serve.adapters.traits import Traits
from lora_serve.engine.batch_builder import Flat, flatten
from lora_serve.engine.scheduler import Work
from lora_serve.engine.sequence import Sequence
from lora_serve.model.batch import Run, VirtualRun
from lora_serve.request import Request, Sampling, Served

SLOTS = {"a": 1, "b": 2, "prefix": 3}
TRAITS = {"a": Traits(invocation=(7, 8)), "b": Traits(), "prefix": Traits(virtual=5)}


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


def lay(*work: Work) -> Flat:
    return flatten(list(work), SLOTS, 4)


def test_rows_of_one_adapter_are_one_run_however_many_sequences_they_are_of() -> None:
    base, one, two = sequence([1, 2, 3]), sequence([4, 5], "b"), sequence([6, 6, 6], "b")
    batch = lay(Work(one, 0, 2), Work(base, 0, 3), Work(two, 0, 3)).batch
    assert batch.runs == [Run(3, 8, 2, 1.0)]
    assert batch.logits_runs == [Run(1, 3, 2, 1.0)]


def test_a_sequence_is_cut_where_an_adapter_becomes_active() -> None:
    seq = sequence([1, 2, 7, 8, 3, 4], "a", logprobs=True)
    assert lay(Work(seq, 0, 6)).batch.runs == [Run(2, 6, 1, 1.0)]
    assert lay(Work(seq, 0, 6)).batch.logits_runs == [Run(2, 6, 1, 1.0)]
    assert lay(Work(seq, 0, 2)).batch.runs == []
    assert lay(Work(seq, 2, 2)).batch.runs == [Run(0, 2, 1, 1.0)]
    assert lay(Work(sequence([1, 2, 3], "a"), 0, 3)).batch.runs == []  # never invoked


def test_a_composition_adds_an_adapter_from_its_own_start_on() -> None:
    batch = lay(Work(sequence([1, 7, 8, 3], "b", "a"), 0, 4)).batch
    assert batch.runs == [Run(0, 1, 2, 1.0), Run(1, 4, 1, 1.0), Run(1, 4, 2, 1.0)]
    assert batch.logits_runs == [Run(0, 1, 1, 1.0), Run(0, 1, 2, 1.0)]


def test_virtual_rows_are_named_and_have_no_token_and_no_logits() -> None:
    seq = sequence([6, 7], "prefix", logprobs=True)
    whole = lay(Work(sequence([9]), 0, 1), Work(seq, 0, 7)).batch
    assert whole.token_ids == [9, 0, 0, 0, 0, 0, 6, 7]
    assert whole.positions == [0, 0, 1, 2, 3, 4, 5, 6]
    assert whole.virtual == [VirtualRun(1, 6, 3, 0)]
    assert whole.logits_rows == [0, 6, 7]
    assert whole.runs == [Run(1, 8, 3, 1.0)]
    middle = lay(Work(seq, 2, 2)).batch
    assert middle.virtual == [VirtualRun(0, 2, 3, 2)]
    assert middle.logits_rows == []
    rest = lay(Work(seq, 4, 3)).batch
    assert (rest.virtual, rest.token_ids) == ([VirtualRun(0, 1, 3, 4)], [0, 6, 7])
    assert lay(Work(seq, 5, 2)).batch.virtual == []
