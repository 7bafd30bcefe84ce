"""The engine, driven step by step: outputs of requests, and that every path frees their resources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_session import Session
from support import reference

from lora_serve.adapters.registry import Lease
from lora_serve.adapters.store.records import AliasRecord, TargetRecord
from lora_serve.engine.admission import check_settings
from lora_serve.errors import SettingsNotApplied
from lora_serve.messages import Abort, AliasTarget, Call, Drain, ListAdapters, PutAlias
from lora_serve.model.batch import Batch
from lora_serve.request import Admitted, EmbeddingParams, Request, Sampling, Tokens


@pytest.fixture(params=[False, True], ids=["step by step", "overlapped"])
def session(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Session]:
    session = Session(tmp_path, overlap=request.param)
    yield session
    session.engine.close()


def greedy(prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        return reference("llama").generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt):].tolist()  # fmt: skip


PROMPTS = [[5, 9, 33, 60, 21], [7, 8, 40], list(range(3, 40)), [11]]


def test_greedy_batches_equal_generate_of_transformers(session: Session) -> None:
    for index, prompt in enumerate(PROMPTS):
        session.send(str(index), prompt, max_tokens=10)
    session.run()
    for index, prompt in enumerate(PROMPTS):
        assert session.tokens(str(index)) == greedy(prompt, 10)
        assert isinstance(session.events[str(index)][0], Admitted)
        assert session.end(str(index)).reason == "length"
    assert session.blocks_used == 0


def test_a_request_is_told_how_many_wait_before_it(session: Session) -> None:
    for index, prompt in enumerate(PROMPTS):
        session.send(str(index), prompt, max_tokens=1)
    session.run()
    admitted = [session.events[str(index)][0] for index in range(len(PROMPTS))]
    assert [event.ahead for event in admitted if isinstance(event, Admitted)] == [0, 1, 2, 3]


def test_a_seeded_request_gives_the_same_tokens_beside_any_others(session: Session) -> None:
    options = {"temperature": 1.0, "seed": 7, "top_p": 0.9}
    alone = session.ask("alone", PROMPTS[0], **options)
    for index, prompt in enumerate(PROMPTS):
        session.send(f"other{index}", prompt, temperature=1.0)
    session.send("beside", PROMPTS[0], **options)
    session.run()
    assert session.tokens("beside") == alone
    assert session.ask("different", PROMPTS[0], **{**options, "seed": 8}) != alone


@pytest.mark.parametrize("overlap", [False, True])
def test_preemption_changes_no_output(tmp_path: Path, overlap: bool) -> None:
    # 3 layers * 2 heads * 16 * 2 * 4 bytes = 768 bytes a token: room for 60 tokens, wanted are 4 * 40.
    session = Session(tmp_path, overlap=overlap, kv_cache_memory=768 * 60, max_model_len=48, prefix_cache=False)
    for index in range(4):
        session.send(str(index), [5 + index, 9, 33], max_tokens=37)
    session.run()
    assert session.engine.stats().preemptions_total > 0
    for index in range(4):
        assert session.tokens(str(index)) == greedy([5 + index, 9, 33], 37)
    session.engine.close()


def test_a_prefix_hit_changes_no_output_and_is_reported(session: Session) -> None:
    prompt = list(range(3, 23))
    first = session.ask("first", prompt)
    assert session.ask("second", prompt) == first
    event = session.events["second"][1]
    assert isinstance(event, Tokens)
    assert event.cached == 16
    assert session.engine.stats().prefix_hit_tokens_total == 16


def test_abort_frees_everything_at_any_moment(session: Session) -> None:
    for steps in range(6):
        session.send(f"r{steps}", list(range(3, 40)), max_tokens=50)
        for _ in range(steps):
            session.step()
        session.engine.receive(Abort(f"r{steps}"))
        session.step()
        assert session.end(f"r{steps}").reason == "abort"
        assert session.blocks_used == 0
    session.engine.receive(Abort("never seen"))
    session.run()


def test_a_stop_token_ends_the_request_and_is_not_sent(session: Session) -> None:
    free = session.ask("free", PROMPTS[0], max_tokens=10)
    stop = free[4]
    cut = free.index(stop)
    assert session.ask("stopped", PROMPTS[0], max_tokens=10, stop_token_ids=(stop,)) == free[:cut]
    assert session.end("stopped").reason == "stop"
    assert session.end("stopped").stop_token == stop
    longer = session.ask("longer", PROMPTS[0], max_tokens=10, stop_token_ids=(stop,), min_tokens=cut + 2)
    assert len(longer) >= cut + 2
    assert stop not in longer[: cut + 2]


def test_the_base_s_eos_token_stops_unless_ignored(session: Session) -> None:
    session.send("a", PROMPTS[0], logit_bias={2: 100.0}, ignore_eos=False)
    session.send("b", PROMPTS[0], logit_bias={2: 100.0}, ignore_eos=True)
    session.run()
    assert (session.tokens("a"), session.end("a").stop_token) == ([], 2)
    assert session.tokens("b") == [2] * 8


def test_prompt_logprobs_are_those_of_transformers_across_chunks(session: Session) -> None:
    prompt = list(range(3, 40))
    session.send("a", prompt, max_tokens=1, prompt_logprobs=2, logprobs=2)
    session.run()
    with torch.inference_mode():
        logits = reference("llama")(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    truth = logits.float().log_softmax(-1)
    event = session.events["a"][1]
    assert isinstance(event, Tokens)
    assert event.prompt_logprobs is not None
    assert event.logprobs is not None
    assert len(event.prompt_logprobs) == len(prompt)
    assert event.prompt_logprobs[0] is None
    for position, entry in enumerate(event.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.token == prompt[position + 1]
        assert entry.value == pytest.approx(truth[position, entry.token].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == truth[position].topk(2).indices.tolist()
    assert event.logprobs[0].value == pytest.approx(truth[-1].max().item(), abs=1e-4)


def test_prompt_logprobs_without_generating(session: Session) -> None:
    session.send("a", PROMPTS[0], max_tokens=0, prompt_logprobs=0)
    session.run()
    assert session.tokens("a") == []
    assert session.end("a").reason == "length"
    assert session.blocks_used == 0


@pytest.mark.parametrize(
    ("prompt", "adapter", "kind", "param"),
    [
        ([], None, "bad_request", "prompt"),
        ([96], None, "bad_request", "prompt"),
        ([-1], None, "bad_request", "prompt"),
        ([5] * 128, None, "context_length_exceeded", "prompt"),
        ([5], "nobody", "adapter_not_found", "adapter"),
    ],
)
def test_refusals_name_the_field_and_hold_no_resources(
    session: Session, prompt: list[int], adapter: str | None, kind: str, param: str
) -> None:
    session.send("a", prompt, adapter=adapter)
    session.run()
    assert len(session.events["a"]) == 1
    failure = session.end("a").failure
    assert failure is not None
    assert (failure.kind, failure.param) == (kind, param)
    assert session.engine.stats().waiting == 0


def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    session = Session(tmp_path, max_queue=2)
    for index in range(3):
        session.send(str(index), PROMPTS[0])
    session.run()
    failure = session.end("2").failure
    assert failure is not None
    assert failure.kind == "overloaded"
    assert failure.retry_after
    assert session.tokens("1") == greedy(PROMPTS[0], 8)
    session.engine.close()


def test_a_sequence_ends_at_the_context_length(session: Session) -> None:
    assert len(session.ask("a", [5] * 120, max_tokens=1000)) == 8
    assert session.end("a").reason == "length"


def test_drain_is_answered_when_all_requests_are_done_and_refuses_new_ones(session: Session) -> None:
    session.send("a", PROMPTS[0])
    session.step()
    session.engine.receive(Call(1, Drain()))
    session.send("b", PROMPTS[0])
    session.step()
    assert 1 not in session.replies
    session.run()
    assert session.replies[1].failure is None
    assert session.tokens("a") == greedy(PROMPTS[0], 8)
    assert session.end("b").failure is not None


def test_closing_ends_running_requests_with_an_error(session: Session) -> None:
    session.send("a", PROMPTS[0], max_tokens=100)
    session.step()
    session.engine.close()
    session.step()
    assert session.end("a").reason == "error"
    assert session.blocks_used == 0


def test_calls_are_answered_between_steps(session: Session) -> None:
    session.send("a", PROMPTS[0])
    session.engine.receive(Call(5, ListAdapters()))
    session.step()
    assert session.replies[5].result == []


@pytest.mark.parametrize("overlap", [False, True])
def test_after_an_out_of_memory_step_only_its_request_ends_and_later_steps_are_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    session = Session(tmp_path, overlap=overlap, max_num_batched_tokens=64)
    base = session.engine._runner._base
    forward = base.forward

    def short(batch: Batch) -> torch.Tensor:
        if len(batch.token_ids) > 12:
            raise torch.OutOfMemoryError("no memory")
        return forward(batch)

    monkeypatch.setattr(base, "forward", short)
    session.send("small", PROMPTS[0], max_tokens=12)
    session.step()
    session.send("large", PROMPTS[2])
    session.run()
    assert session.tokens("small") == greedy(PROMPTS[0], 12)
    failure = session.end("large").failure
    assert failure is not None
    assert failure.kind == "unavailable"
    assert session.engine._scheduler.max_tokens == 32
    assert session.blocks_used == 0
    session.engine.close()


def test_headers_that_aliases_go_by_are_told_before_the_change_is_answered(tmp_path: Path) -> None:
    session = Session(tmp_path)
    engine = session.engine
    engine.receive(Call(1, PutAlias("prod", [AliasTarget("nothing")], "header:X-Session")))
    assert [reply.failure.param for reply in engine.replies() if reply.failure] == ["targets.0.adapter"]
    engine._registry._residency.aliases.end("prod", AliasRecord([TargetRecord("a")], "header:X-Session"))
    update = engine.step()
    assert update.stats is not None
    assert update.stats.sticky_headers == ["x-session"]
    assert engine.step().stats is None
    engine._registry._some_settings = True  # and so is a change of what names stand for, once a version has settings
    update = engine.step()
    assert update.stats is not None
    assert update.stats.settings_state > 0
    assert engine.step().stats is None
    engine.close()


@pytest.mark.parametrize("embedding", [None, EmbeddingParams()])
def test_a_request_to_generate_must_be_made_by_the_settings_of_its_adapters(embedding: EmbeddingParams | None) -> None:
    request = Request("r", [1], Sampling(max_tokens=1), embedding=embedding)
    leases = [Lease("plain", "a", 1.0), Lease("poet", "b", 1.0, settings_missing=True)]
    if embedding is not None:
        check_settings(request, leases)
        return
    with pytest.raises(SettingsNotApplied, match="adapter poet was replaced") as refused:
        check_settings(request, leases)
    assert refused.value.retry_after == 1
