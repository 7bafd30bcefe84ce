"""Embeddings of the base and of adapters, in one batch with generation, equal pooled hidden states of PEFT's models."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from embedding_parity import describe_pooling, embed, embedding, hidden_states, peft_body, pooled
from engine_session import Session
from parity import make_adapter
from support import ARCHITECTURES, make_model, reference

from lora_serve.messages import Abort
from lora_serve.request import AdapterUse

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EMBEDS: dict[str, Any] = {"task_type": "FEATURE_EXTRACTION"}
VIRTUAL = 6
CONFIGS: dict[str, Any] = {
    "short": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **EMBEDS),
    "scaled": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **EMBEDS),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, **EMBEDS),
    "whole": peft.LoraConfig(r=3, target_modules=["v_proj", "up_proj"], **EMBEDS),
}
LENGTHS = (1, 4, 7, 16, 23, 41)


def prompts(seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 90) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Any]:
    """PEFT's models without head, by adapter; the base under ''."""
    found = {name: peft_body(folder / name, config, seed) for seed, (name, config) in enumerate(CONFIGS.items())}
    describe_pooling(folder / "whole", "mean", normalize=False)
    make_adapter("llama", folder / "writer", 7, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return found | {"": reference("llama").model}


@pytest.fixture(params=[False, True], ids=["step by step", "overlapped"])
def overlap(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.fixture
def start(tmp_path: Path, folder: Path, models: dict[str, Any]) -> Any:
    """Start an engine on a base that pools as asked."""
    sessions = []

    def start(mode: str | None = "lasttoken", *, normalize: bool = True, **options: Any) -> Session:
        if mode is not None:
            describe_pooling(tmp_path / "base", mode, normalize=normalize)
        sessions.append(Session(tmp_path, adapters=folder, max_model_len=64, **options))
        assert not sessions[-1].engine.info.notes
        return sessions[-1]

    yield start
    for session in sessions:
        assert session.blocks_used == 0
        session.engine.close()


Start = Callable[..., Session]


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_base_and_adapters_embed_beside_generation(
    start: Start, models: dict[str, Any], mode: str, overlap: bool
) -> None:
    session = start(mode, normalize=False, overlap=overlap)
    alone = session.ask("alone", [5, 9, 33, 60], max_tokens=20)
    for round in range(2):  # the second time, prefixes are cached
        session.send(f"running {round}", [5, 9, 33, 60], max_tokens=20)
        session.step()
        for name in models:
            for index, prompt in enumerate(prompts()):
                embed(session, f"{name} {index} {round}", prompt, adapter=name or None)
        session.run()
        assert session.tokens(f"running {round}") == alone
        for name, model in models.items():
            own_mode = "mean" if name == "whole" else mode
            for index, prompt in enumerate(prompts()):
                want = pooled(hidden_states(model, prompt), own_mode, normalize=False)
                found = embedding(session, f"{name} {index} {round}")
                torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5, msg=f"{name} {prompt}")


def test_without_files_of_its_own_or_the_base_s_an_adapter_embeds_by_the_last_token_normalised(
    start: Start, models: dict[str, Any]
) -> None:
    session = start(None)
    for name in ("short", "prompt", "whole"):
        embed(session, name, prompts()[4], adapter=name)
    session.run()
    for name in ("short", "prompt"):
        want = pooled(hidden_states(models[name], prompts()[4]), "lasttoken", normalize=True)
        torch.testing.assert_close(embedding(session, name), want, atol=1e-5, rtol=1e-5)
    want = pooled(hidden_states(models["whole"], prompts()[4]), "mean", normalize=False)
    torch.testing.assert_close(embedding(session, "whole"), want, atol=1e-5, rtol=1e-5)


def test_a_base_without_sentence_transformers_files_and_adapters_for_text_make_no_embeddings(start: Start) -> None:
    session = start(None)
    embed(session, "base", [5, 9])
    embed(session, "writer", [5, 9], adapter="writer")
    embed(session, "both", [5, 9], uses=(AdapterUse("short"), AdapterUse("writer")))
    embed(session, "unlike", [5, 9], uses=(AdapterUse("short"), AdapterUse("whole")))
    session.run()
    assert (session.refusal("base").kind, session.refusal("base").param) == ("bad_request", "model")
    assert "no modules.json" in session.refusal("base").message
    assert session.refusal("writer").param == session.refusal("both").param == "adapter"
    assert "writer makes no embeddings" in session.refusal("writer").message
    assert "FEATURE_EXTRACTION" in session.refusal("both").message
    assert "pool differently" in session.refusal("unlike").message
    assert session.ask("text", [5, 9], adapter="short")  # what embeds may still generate


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_preemption_changes_no_embedding(start: Start, models: dict[str, Any], mode: str, overlap: bool) -> None:
    # 768 bytes a token: room for 64, wanted are several times that.
    session = start(mode, overlap=overlap, kv_cache_memory=768 * 64, max_queue=99)
    for name in ("", "short", "prompt"):
        session.send(f"running {name}", [5, 9, 33], max_tokens=40, adapter=name or None)
        for index, prompt in enumerate(prompts()):
            embed(session, f"{name} {index}", prompt, adapter=name or None)
        session.step()
    session.run()
    assert session.engine.stats().preemptions_total > 0
    for name in ("", "short", "prompt"):
        for index, prompt in enumerate(prompts()):
            want = pooled(hidden_states(models[name], prompt), mode, normalize=True)
            torch.testing.assert_close(embedding(session, f"{name} {index}"), want, atol=1e-5, rtol=1e-5)


def test_embedding_and_generation_share_the_prefix_cache(start: Start) -> None:
    session = start("lasttoken")
    prompt = prompts()[5]
    embed(session, "first", prompt)
    session.run()
    session.ask("text", prompt)
    embed(session, "again", prompt)
    session.run()
    assert session.engine.stats().prefix_hit_tokens_total == 2 * 40
    torch.testing.assert_close(embedding(session, "again"), embedding(session, "first"), atol=1e-5, rtol=1e-5)


def test_mean_pooling_computes_the_whole_prompt_although_its_beginning_is_cached(start: Start) -> None:
    session = start("mean")
    session.ask("text", prompts()[5])
    embed(session, "mean", prompts()[5])
    session.run()
    assert session.engine.stats().prefix_hit_tokens_total == 0


def test_hidden_states_that_are_not_finite_end_only_their_request(
    tmp_path: Path, models: dict[str, Any], folder: Path
) -> None:
    poison = peft_body(tmp_path / "poison", CONFIGS["short"], 0)
    with torch.no_grad():
        for name, parameter in poison.named_parameters():
            if "lora_" in name:
                parameter.fill_(1e18)  # finite in its effect on one input, not after a few layers
    poison.save_pretrained(tmp_path / "adapters" / "poison")
    describe_pooling(tmp_path / "base", "mean", normalize=True)
    session = Session(tmp_path, adapters=tmp_path / "adapters", max_model_len=64)
    for index, prompt in enumerate(prompts()):
        embed(session, f"poison {index}", prompt, adapter="poison")
        embed(session, f"base {index}", prompt)
    session.run()
    for index, prompt in enumerate(prompts()):
        failure = session.end(f"poison {index}").failure
        assert failure is not None
        assert (failure.kind, "not finite" in failure.message) == ("engine_fault", True)
        want = pooled(hidden_states(models[""], prompt), "mean", normalize=True)
        torch.testing.assert_close(embedding(session, f"base {index}"), want, atol=1e-5, rtol=1e-5)
    assert session.blocks_used == 0
    session.engine.close()


def test_fewer_dimensions_are_the_first_ones_normalised(start: Start, models: dict[str, Any]) -> None:
    session = start("mean", normalize=False)
    embed(session, "few", prompts()[3], dimensions=10)
    embed(session, "all", prompts()[3], dimensions=64)
    embed(session, "more", prompts()[3], dimensions=65)
    session.run()
    for id, dimensions in (("few", 10), ("all", 64)):
        want = pooled(hidden_states(models[""], prompts()[3]), "mean", normalize=True, dimensions=dimensions)
        torch.testing.assert_close(embedding(session, id), want, atol=1e-5, rtol=1e-5)
    assert (session.refusal("more").param, session.refusal("more").message) == (
        "dimensions",
        "an embedding has 64 dimensions",
    )


def test_inputs_that_cannot_be_embedded_are_refused_by_field(start: Start) -> None:
    session = start()
    embed(session, "fits", [5] * 64)
    embed(session, "long", [5] * 65)
    embed(session, "virtual", [5] * 59, adapter="prompt")
    embed(session, "empty", [])
    embed(session, "unknown", [96])
    session.run()
    assert len(embedding(session, "fits")) == 64
    for id in ("long", "virtual"):
        assert (session.refusal(id).kind, session.refusal(id).param) == ("context_length_exceeded", "input")
    for id in ("empty", "unknown"):
        assert (session.refusal(id).kind, session.refusal(id).param) == ("bad_request", "input")


def test_an_aborted_embedding_leaves_nothing_behind(start: Start, models: dict[str, Any], overlap: bool) -> None:
    session = start("mean", overlap=overlap)
    embed(session, "leaves", prompts()[5])
    session.step()
    session.step()
    session.engine.receive(Abort("leaves"))
    embed(session, "leaves", prompts()[4])  # the id is free again
    session.run()
    want = pooled(hidden_states(models[""], prompts()[4]), "mean", normalize=True)
    torch.testing.assert_close(embedding(session, "leaves"), want, atol=1e-5, rtol=1e-5)


def test_a_base_saved_without_its_head_embeds_and_generates_no_text(tmp_path: Path) -> None:
    reference("llama").model.save_pretrained(tmp_path / "bare")
    describe_pooling(tmp_path / "bare", "mean", normalize=False)
    session = Session(tmp_path, model=str(tmp_path / "bare"))
    embed(session, "a", prompts()[4])
    session.send("text", prompts()[4])
    session.run()
    want = hidden_states(reference("llama").model, prompts()[4]).mean(0)
    torch.testing.assert_close(embedding(session, "a"), want, atol=1e-5, rtol=1e-5)
    assert (session.refusal("text").kind, session.refusal("text").param) == ("bad_request", "model")
    assert any("no LM head" in note for note in session.engine.info.notes)
    session.engine.close()


@pytest.mark.parametrize(
    ("file", "content", "left_out"),
    [
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "the default prompt"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "the chat template"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "the lower-casing"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling mode max"),
    ],
)
def test_what_sentence_transformers_would_do_beyond_pooling_is_in_the_start_up_notes(
    tmp_path: Path, file: str, content: Any, left_out: str
) -> None:
    describe_pooling(tmp_path / "base", "mean", normalize=False)
    (tmp_path / "base" / file).write_text(json.dumps(content))
    session = Session(tmp_path)
    assert any(left_out in note for note in session.engine.info.notes)
    session.engine.close()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_embeds_its_head_s_input(architecture: str, tmp_path: Path) -> None:
    describe_pooling(tmp_path / "base", "mean", normalize=False)
    config = peft.LoraConfig(r=4, target_modules="all-linear", **EMBEDS)
    model = peft_body(tmp_path / "adapters" / "own", config, 1, architecture)
    session = Session(tmp_path, architecture=architecture, adapters=tmp_path / "adapters", max_model_len=64)
    assert not session.engine.info.notes
    for index, prompt in enumerate(prompts()):
        embed(session, f"base {index}", prompt)
        embed(session, f"own {index}", prompt, adapter="own")
        session.send(f"running {index}", prompt, max_tokens=3)
    session.run()
    bare = make_model(ARCHITECTURES[architecture]).base_model
    for index, prompt in enumerate(prompts()):
        for name, oracle in (("base", bare), ("own", model)):
            want = hidden_states(oracle, prompt).mean(0)
            torch.testing.assert_close(embedding(session, f"{name} {index}"), want, atol=1e-5, rtol=1e-5)
    session.engine.close()


def test_bfloat16_embeddings_are_as_good_as_transformers(tmp_path: Path, folder: Path, models: dict[str, Any]) -> None:
    describe_pooling(tmp_path / "base", "mean", normalize=True)
    session = Session(tmp_path, adapters=folder, max_model_len=64, dtype="bfloat16")
    for index, prompt in enumerate(prompts()):
        embed(session, f"base {index}", prompt)
        embed(session, f"short {index}", prompt, adapter="short")
    session.run()
    half = {"base": reference("llama").model, "short": models["short"]}
    for name, model in half.items():
        rounded = copy.deepcopy(model).to(torch.bfloat16)
        for index, prompt in enumerate(prompts()):
            want = pooled(hidden_states(model, prompt), "mean", normalize=True)
            theirs = pooled(hidden_states(rounded, prompt), "mean", normalize=True)
            found = embedding(session, f"{name} {index}")
            assert 1 - found @ want <= 2 * (1 - theirs @ want) + 1e-4
    session.engine.close()
