"""The engine with adapters that change a whole sequence: virtual tokens, invocations, vocabularies, compositions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine_session import Session
from parity import logits, make_adapter
from support import reference

from lora_serve.messages import Call, ListAdapters
from lora_serve.request import AdapterUse, Tokens

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
VIRTUAL = 6
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], **TASK}
CONFIGS: dict[str, Any] = {
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, **TASK),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **TASK),
    "plain": peft.LoraConfig(**LORA),
    "invoked": peft.LoraConfig(**LORA, alora_invocation_tokens=[11, 12]),
}
PROMPTS = [[5, 9, 33, 60, 21], [7, 8, 40], list(range(3, 30)), [5, 11, 12, 9]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Adapters saved by PEFT, and the PEFT models."""
    folder = tmp_path_factory.mktemp("adapters")
    models = {
        name: make_adapter("llama", folder / name, seed, config) for seed, (name, config) in enumerate(CONFIGS.items())
    }
    make_adapter("llama", folder / "again", 2, CONFIGS["plain"])  # another name of one content
    resized = copy.deepcopy(reference("llama"))
    resized.resize_token_embeddings(103, mean_resizing=False)
    torch.manual_seed(9)
    with torch.no_grad():
        resized.get_input_embeddings().weight[96:].normal_(0, 0.12)
        resized.get_output_embeddings().weight[96:].normal_(0, 0.3)
    larger = peft.get_peft_model(resized, peft.LoraConfig(**LORA, init_lora_weights=False)).eval()
    larger.save_pretrained(folder / "larger", save_embedding_layers=True)
    return folder, models | {"larger": larger}


@pytest.fixture(params=[False, True], ids=["step by step", "overlapped"])
def session(folders: tuple[Path, dict[str, Any]], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Session]:
    session = Session(tmp_path, overlap=request.param, adapters=folders[0], max_model_len=64)
    assert not session.engine.info.notes
    yield session
    session.engine.close()


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        found: list[int] = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
    return found


def leases(session: Session) -> int:
    session.engine.receive(Call(1, ListAdapters()))
    session.step()
    return sum(version["leases"] for info in session.replies[1].result for version in info["versions"])


def test_a_mixed_batch_gives_what_peft_generates(session: Session, folders: tuple[Path, dict[str, Any]]) -> None:
    for name in CONFIGS:
        for index, prompt in enumerate(PROMPTS):
            session.send(f"{name} {index}", prompt, adapter=name, tenant=str(index % 2))
    session.run()
    for name in CONFIGS:
        for index, prompt in enumerate(PROMPTS):
            assert session.tokens(f"{name} {index}") == generated(folders[1][name], prompt, 8), (name, prompt)
    assert session.blocks_used == 0
    assert leases(session) == 0


def test_preemption_recomputes_virtual_tokens_and_changes_no_output(
    folders: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    # 768 bytes a token: room for 60, wanted are 4 * 46.
    session = Session(
        tmp_path, adapters=folders[0], kv_cache_memory=768 * 60, max_model_len=48, prefix_cache=False, max_queue=9
    )
    for index in range(4):
        session.send(str(index), [5 + index, 9, 33], adapter=["prompt", "prefix"][index % 2], max_tokens=37)
    session.run()
    assert session.engine.stats().preemptions_total > 0
    for index in range(4):
        model = folders[1][["prompt", "prefix"][index % 2]]
        assert session.tokens(str(index)) == generated(model, [5 + index, 9, 33], 37)
    session.engine.close()


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_prompt_logprobs_equal_peft_across_chunks_and_prefix_hits_and_the_first_is_none(
    session: Session, folders: tuple[Path, dict[str, Any]], name: str
) -> None:
    prompt = PROMPTS[2]
    truth = logits(folders[1][name], prompt).log_softmax(-1)
    for id in ("computed", "found"):
        session.ask(id, prompt, adapter=name, max_tokens=1, prompt_logprobs=1)
        event = session.events[id][1]
        assert isinstance(event, Tokens)
        assert event.prompt_logprobs is not None
        first, *rest = event.prompt_logprobs
        assert first is None
        assert [entry.token for entry in rest if entry] == prompt[1:]
        for position, entry in enumerate(rest):
            assert entry is not None
            assert entry.value == pytest.approx(truth[position, entry.token].item(), abs=1e-4)
        assert event.cached == 0


def test_cached_tokens_do_not_count_virtual_tokens(session: Session) -> None:
    prompt = PROMPTS[2]  # 27 tokens after 6 virtual ones: 8 blocks of 4
    first = session.ask("first", prompt, adapter="prompt")
    assert session.ask("second", prompt, adapter="prompt") == first
    event = session.events["second"][1]
    assert isinstance(event, Tokens)
    assert event.cached == 32 - VIRTUAL


def test_penalties_ignore_virtual_tokens(session: Session, folders: tuple[Path, dict[str, Any]]) -> None:
    asked = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {95: -1.0}}
    token = session.ask("a", PROMPTS[0], adapter="prefix", max_tokens=1, **asked)[0]
    row = logits(folders[1]["prefix"], PROMPTS[0])[-1].clone()
    row[95] -= 1.0
    seen = row[PROMPTS[0]]
    row[PROMPTS[0]] = torch.where(seen > 0, seen / 1.3, seen * 1.3)
    assert token == int(row.argmax())


def test_virtual_tokens_count_towards_the_context_length(session: Session) -> None:
    session.send("long", [5] * (64 - VIRTUAL), adapter="prompt")
    session.run()
    assert session.refusal("long").kind == "context_length_exceeded"
    assert f"{VIRTUAL} virtual" in session.refusal("long").message
    assert len(session.ask("fits", [5] * 50, adapter="prompt", max_tokens=100)) == 64 - VIRTUAL - 50
    assert session.end("fits").reason == "length"
    assert leases(session) == 0


@pytest.mark.parametrize(
    "uses",
    [
        (AdapterUse("prompt", weight=0.5),),
        (AdapterUse("plain"), AdapterUse("prefix")),
        (AdapterUse("prefix"), AdapterUse("prefix")),
        (AdapterUse("larger"), AdapterUse("plain")),
    ],
)
def test_adapters_that_cannot_be_composed_are_refused_and_leave_no_lease(
    session: Session, uses: tuple[AdapterUse, ...]
) -> None:
    session.send("a", PROMPTS[0], uses=uses)
    session.run()
    failure = session.refusal("a")
    assert (failure.kind, failure.param) == ("bad_request", "adapter")
    assert "cannot be" in failure.message
    assert leases(session) == 0


def test_more_than_eight_adapters_in_one_request_are_refused(session: Session) -> None:
    session.send("a", PROMPTS[0], uses=tuple(AdapterUse("plain") for _ in range(9)))
    session.run()
    assert session.refusal("a").param == "adapter"


def test_an_adapter_named_twice_has_the_sum_of_its_weights(session: Session) -> None:
    session.send("twice", PROMPTS[0], uses=(AdapterUse("plain", weight=1.5), AdapterUse("again", weight=0.5)))
    session.send("double", PROMPTS[0], uses=(AdapterUse("plain", weight=2.0),))
    session.run()
    assert session.tokens("twice") == session.tokens("double")
    assert session.engine.stats().loads_total == {"host": 1, "device": 1}  # one content


def test_different_weights_of_an_adapter_share_its_memory_but_not_its_kv(session: Session) -> None:
    prompt = PROMPTS[2]
    for weight in (1.0, 0.5):
        session.send(str(weight), prompt, uses=(AdapterUse("plain", weight=weight),))
        session.run()
    stats = session.engine.stats()
    assert stats.loads_total == {"host": 1, "device": 1}
    assert stats.prefix_hit_tokens_total == 0
    session.ask("again", prompt, uses=(AdapterUse("plain", weight=0.5),))
    assert session.engine.stats().prefix_hit_tokens_total > 0


def test_an_invoked_adapter_reuses_the_base_s_kv_before_its_invocation(
    session: Session, folders: tuple[Path, dict[str, Any]]
) -> None:
    prompt = [*range(40, 57), 11, 12, 7]
    session.ask("base", prompt)
    assert session.ask("invoked", prompt, adapter="invoked") == generated(folders[1]["invoked"], prompt, 8)
    event = session.events["invoked"][1]
    assert isinstance(event, Tokens)
    assert event.cached == 16
    session.ask("plain", prompt, adapter="plain")
    assert session.engine.stats().prefix_hit_tokens_total == 16


def test_a_larger_vocabulary_applies_to_its_adapter_only(
    session: Session, folders: tuple[Path, dict[str, Any]]
) -> None:
    prompt = [5, 100, 33, 101]
    asked = {"logit_bias": {102: 1.0}, "top_k": 200, "logprobs": 3, "temperature": 0.7, "seed": 3}
    session.send("larger", prompt, adapter="larger", prompt_logprobs=100, **asked)
    session.send("base", prompt)
    session.send("beside", PROMPTS[0], prompt_logprobs=2, logprobs=100, temperature=0.7, seed=3)
    session.send("greedy", prompt, adapter="larger")
    session.run()
    assert session.refusal("base").param == "prompt"
    assert session.tokens("greedy") == generated(folders[1]["larger"], prompt, 8)
    assert max(session.tokens("beside")) < 96
    events = [event for event in session.events["beside"] if isinstance(event, Tokens)]
    assert all(len(entry.top) == 96 for event in events for entry in event.logprobs or [])
    assert session.ask("alone", PROMPTS[0], temperature=0.7, seed=3) == session.tokens("beside")
    truth = logits(folders[1]["larger"], prompt).log_softmax(-1)
    event = session.events["larger"][1]
    assert isinstance(event, Tokens)
    assert event.prompt_logprobs is not None
    for position, entry in enumerate(event.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.value == pytest.approx(truth[position, prompt[position + 1]].item(), abs=1e-4)
