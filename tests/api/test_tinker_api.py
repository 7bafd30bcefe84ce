"""Tinker's routes with a stub engine: order, repeats, refusals, restarts, whose things are whose, and what is freed."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from stub_admin import refusal
from stub_training import StubTrainingApp, pass_body, sample_body, samples, step_body

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.api.private_adapters import private_adapter
from lora_serve.api.tinker import future_results, ordered_calls, sample_runs, sampling_sessions
from lora_serve.api.tinker.protobuf_messages import SampleResponse
from lora_serve.api.tinker.sampling_sessions import KEPT_EPHEMERAL
from lora_serve.api.tinker.tinker_errors import UnknownTinkerObject
from lora_serve.api.tinker.tinker_service import SILENT_SECONDS
from lora_serve.errors import Overloaded

KEYS = {
    "sk-a": Caller("a", admin=True, key="1"),
    "sk-b": Caller("b", admin=True, key="2"),
    "sk-c": Caller("c", key="3"),
}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[StubTrainingApp]:
    async with StubTrainingApp(tmp_path) as app:
        yield app


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[StubTrainingApp]:
    async with StubTrainingApp(tmp_path, Keys({hash_key(key): caller for key, caller in KEYS.items()})) as app:
        yield app


async def test_a_model_is_made_described_and_trained(server: StubTrainingApp) -> None:
    model = await server.model(await server.session())
    info = await server.ask("get_info", {"model_id": model, "type": "get_info"})
    assert info["model_data"] == {"arch": "base", "model_name": "any:base", "tokenizer_id": "root"}
    assert info["lora_rank"] == 8
    assert await server.train(model, 1, 0.5) == 0
    assert await server.train(model, 2, 0.25) == 0
    stepped = await server.step(model, 3)
    assert stepped["metrics"] == {"grad_norm:mean": 0.75, "learning_rate:mean": 1.0}
    assert await server.train(model, 4) == -0.75
    settings = server.engine.runs[model].settings
    assert (settings.r, settings.lora_alpha, settings.target_modules) == (8, 32, "all-linear")


async def test_groups_of_layers_are_chosen(server: StubTrainingApp) -> None:
    session = await server.session()
    attention = await server.model(session, 0, train_mlp=False, train_unembed=False, seed=5)
    mlp = await server.model(session, 1, train_attn=False)
    first, second = server.engine.runs[attention].settings, server.engine.runs[mlp].settings
    assert (first.train_lm_head, second.train_lm_head, first.seed) == (False, True, 5)
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "transformer.h.0.attn.c_attn", "lm_head"]
    for settings, named in ((first, [True, False, True, False]), (second, [False, True, False, False])):
        assert [bool(re.fullmatch(str(settings.target_modules), path)) for path in paths] == named
    body = {"session_id": session, "model_seq_id": 2, "base_model": "base"}
    alone = {"rank": 4, "train_mlp": False, "train_attn": False}
    assert "alone" in (await server.call("create_model", body | {"lora_config": alone}))["error"]


async def test_calls_are_carried_out_by_number_whatever_order_they_come_in(server: StubTrainingApp) -> None:
    model = await server.model(await server.session())
    late = [pass_body(model, 2, 20.0), pass_body(model, 1, 10.0)]
    ids = [(await server.ask("forward_backward", body))["request_id"] for body in late]
    for id_ in ids:
        await server.result(id_)
    assert [each.examples[0].inputs["weights"] for each in server.engine.passes] == [[10.0], [20.0]]


async def test_a_repeated_call_is_carried_out_once(server: StubTrainingApp) -> None:
    session = await server.session()
    model = await server.model(session)
    assert await server.model(session) == model
    first = await server.ask("forward_backward", pass_body(model, 1))
    assert await server.ask("forward_backward", pass_body(model, 1)) == first
    assert await server.result(first["request_id"]) == await server.result(first["request_id"])
    assert await server.ask("forward_backward", pass_body(model, 1)) == first
    assert len(server.engine.passes) == 1


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("forward_backward", lambda model: pass_body(model, 1, loss="nonsense"), "'nonsense' is no loss function"),
        ("forward_backward", lambda model: pass_body(model, 1) + b"\x1a\x00", "no target_tokens"),
        ("optim_step", lambda model: step_body(model, 1) | {"adam_params": {"momentum": 1}}, "adam_params.momentum"),
        ("optim_step", lambda model: {"model_id": model, "seq_id": 1, "optimizer_params": {}}, "adam_params"),
        ("save_weights", lambda model: {"model_id": model, "seq_id": 1, "path": "a/b"}, "a checkpoint's name"),
        ("save_weights", lambda model: {"model_id": model, "seq_id": 1, "ttl_seconds": 5}, "ttl_seconds"),
        ("save_weights_external", lambda model: {"model_id": model, "seq_id": 1, "path": "a"}, "is not served"),
        ("load_weights", lambda model: {"model_id": model, "seq_id": 1, "path": "tinker://x", "optimizer": True}, "no"),
    ],
)
async def test_a_wrong_call_gets_an_error_as_result_and_the_next_has_its_turn(
    server: StubTrainingApp, path: str, body: Any, problem: str
) -> None:
    model = await server.model(await server.session())
    result = await server.call(path, body(model))
    assert result["category"] == "user"
    assert problem in result["error"]
    assert await server.train(model, 2) == 0


async def test_without_training_memory_a_model_is_refused_clearly(server: StubTrainingApp) -> None:
    assert server.engine.info is not None
    server.engine.info = msgspec.structs.replace(server.engine.info, training_memory=0)
    made = await server.call(
        "create_model", {"session_id": await server.session(), "model_seq_id": 0, "base_model": "base"}
    )
    assert "--training-memory" in made["error"]


async def test_another_base_and_optimizer_are_refused(server: StubTrainingApp) -> None:
    session = await server.session()
    for number, given in enumerate([{"base_model": "llama"}, {"optimizer_config": {"type": "dimuon"}}]):
        body = {"session_id": session, "model_seq_id": number, "base_model": "base"} | given
        made = await server.call("create_model", body)
        assert made["category"] == "user"
        after = await server.call("optim_step", step_body(f"{session}:train:{number}", 1))
        assert after["error"].startswith("the model was not made: ")


async def test_a_result_that_is_not_there_is_waited_for(
    server: StubTrainingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_serve.api.tinker.tinker_sessions_api.POLL_SECONDS", 0.02)
    monkeypatch.setattr("lora_serve.api.tinker.tinker_sessions_api.POLL_STEP", 0.01)
    model = await server.model(await server.session())
    server.engine.gate = asyncio.Event()
    sent = await server.ask("forward_backward", pass_body(model, 1))
    answer = await server.send("retrieve_future", {"request_id": sent["request_id"]})
    assert (answer.status_code, answer.json()["queue_state"]) == (408, "active")
    server.engine.gate.set()
    assert isinstance(await server.result(sent["request_id"]), bytes)


async def test_a_model_goes_on_after_the_engine_ended(server: StubTrainingApp) -> None:
    model = await server.model(await server.session())
    await server.train(model, 1, 1.0)
    await server.step(model, 2)
    await server.train(model, 3, 2.0)
    server.engine.lose()  # between calls, with a gradient that is not applied
    await server.step(model, 4)
    assert await server.train(model, 5, 4.0) == -3
    server.engine.lost_at.add(server.engine.count + 1)  # during the next one
    await server.step(model, 6)
    assert await server.train(model, 7) == -7


async def test_a_session_goes_on_after_the_server_ended(tmp_path: Path) -> None:
    async with StubTrainingApp(tmp_path) as before:
        session = await before.session()
        model = await before.model(session)
        await before.train(model, 1, 1.0)
        await before.step(model, 2)
        saved = await before.call("save_weights", {"model_id": model, "seq_id": 3, "path": "one"})
        assert saved["path"] == f"tinker://{model}/weights/one"
        sampler = await before.call(
            "save_weights_for_sampler", {"model_id": model, "seq_id": 4, "sampling_session_seq_id": 0}
        )
        early = await before.ask("forward_backward", pass_body(model, 6, 16.0))
    async with StubTrainingApp(tmp_path) as server:  # the engine is another one as well
        server.engine.resolves |= before.engine.resolves
        assert await server.train(model, 5, 8.0) == -1
        assert isinstance(await server.result(early["request_id"]), bytes)
        await server.step(model, 7)
        assert await server.train(model, 8) == -25
        assert await server.call("save_weights", {"model_id": model, "seq_id": 3, "path": "one"}) == saved
        assert samples(await server.call("asample", sample_body(sampler["sampling_session_id"]))) == [list(b"hell")]
        lost = await server.send("retrieve_future", {"request_id": f"{sampler['sampling_session_id']}:9"})
        assert lost.status_code == 410  # the client asks anew


async def test_what_would_take_long_to_repeat_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_serve.api.tinker.resumable_run.REPLAY_BYTES", 0)
    async with StubTrainingApp(tmp_path) as before:
        model = await before.model(await before.session())
        for seq in (1, 3, 5):
            await before.train(model, seq, 1.0)
            unfetched = await before.ask("optim_step", step_body(model, seq + 1))
        await before.train(model, 7, 1.0)
        (journal,) = tmp_path.glob("tinker/sessions/*/models/0")
        assert [path.name for path in journal.glob("state-*")] == ["state-6"]
    async with StubTrainingApp(tmp_path) as server:
        assert "metrics" in await server.result(unfetched["request_id"])
        await server.step(model, 8)
        assert await server.train(model, 9) == -4
        assert sum(len(each.examples) for each in server.engine.passes) == 2  # 7 and 9
        lost = await server.result(f"{model}:1")
        assert (lost["category"], "lost" in lost["error"]) == ("server", True)


async def test_checkpoints_are_loaded_listed_and_deleted(server: StubTrainingApp) -> None:
    session = await server.session()
    model = await server.model(session)
    await server.train(model, 1, 3.0)
    await server.step(model, 2)
    path = (await server.call("save_weights", {"model_id": model, "seq_id": 3, "path": "one"}))["path"]
    again = await server.call("save_weights", {"model_id": model, "seq_id": 4, "path": "one"})
    assert "overwrite" in again["error"]
    await server.call("save_weights", {"model_id": model, "seq_id": 5, "path": "one", "overwrite": True})
    body = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True, "type": "load_weights"}
    assert (await server.call("load_weights", body))["model_id"] == f"{session}:train:1"
    shown = (await server.client.get("/api/v1/checkpoints")).json()
    assert [each["tinker_path"] for each in shown["checkpoints"]] == [path]
    assert shown["cursor"] == {"offset": 0, "limit": 100, "total_count": 1}
    runs = (await server.client.get("/api/v1/training_runs")).json()["training_runs"]
    assert [each["training_run_id"] for each in runs] == [f"{session}:train:1", model]
    assert (await server.ask("weights_info", {"tinker_path": path}))["lora_rank"] == 8
    checkpoint = f"/api/v1/training_runs/{model}/checkpoints/weights/one"
    assert (await server.client.put(f"{checkpoint}/ttl", json={"ttl_seconds": 3600})).status_code == 200
    shown = (await server.client.get(f"/api/v1/training_runs/{model}/checkpoints")).json()
    assert shown["checkpoints"][0]["expires_at"]
    (found,) = server.app.state.tinker.checkpoints.list("")
    assert (await server.client.delete(checkpoint)).status_code == 200
    assert (await server.client.delete(checkpoint)).status_code == 404
    with pytest.raises(UnknownTinkerObject):  # found before it was deleted
        server.app.state.tinker.checkpoints.set_expiry(found, None)
    server.engine.lose()  # the model goes on without the checkpoint that it was loaded from
    assert await server.train(f"{session}:train:1", 1) == -3


async def test_a_deleted_checkpoint_does_not_come_back_when_its_model_goes_on(tmp_path: Path) -> None:
    async with StubTrainingApp(tmp_path) as before:
        session = await before.session()
        model = await before.model(session)
        for seq, name in ((1, "deleted"), (2, "replaced"), (4, "kept")):
            await before.call("save_weights", {"model_id": model, "seq_id": seq, "path": name})
            if name == "replaced":
                more = {"path": "replaced", "overwrite": True}
                await before.call("save_weights", {"model_id": model, "seq_id": 3, **more})
        await before.call("save_weights_for_sampler", {"model_id": model, "seq_id": 5, "path": "sampled"})
        for gone in ("weights/deleted", "sampler_weights/sampled"):
            assert (await before.client.delete(f"/api/v1/training_runs/{model}/checkpoints/{gone}")).status_code == 200
        assert len(list((tmp_path / "tinker" / "checkpoints").glob("*/state"))) == 2
    async with StubTrainingApp(tmp_path) as server:
        assert await server.train(model, 6) == 0  # after all calls were repeated
        shown = (await server.client.get("/api/v1/checkpoints")).json()["checkpoints"]
        assert {each["checkpoint_id"] for each in shown} == {"weights/replaced", "weights/kept"}
        assert not [name for name in server.engine.adapters if name.startswith("tinker-")]
        service, folder = server.app.state.tinker, tmp_path / "tinker" / "checkpoints"
        await service._forget_deleted()
        assert len(list(folder.iterdir())) == 5  # its calls may be repeated once more
        await service.finish(session, "")
        await service._forget_deleted()
        assert len(list(folder.iterdir())) == 2


async def test_weights_are_sampled_by_name(server: StubTrainingApp) -> None:
    session = await server.session()
    model = await server.model(session)
    body = {"model_id": model, "seq_id": 1, "path": "final", "kind": "snapshot", "type": "save_weights_for_sampler"}
    path = (await server.call("save_weights_for_sampler", body))["path"]
    assert path == f"tinker://{model}/sampler_weights/final"
    given = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
    sampler = (await server.ask("create_sampling_session", given))["sampling_session_id"]
    await server.call("asample", sample_body(sampler))
    (use,) = server.engine.requests[0].adapters
    assert (use.name, use.version) == (next(iter(server.engine.adapters)), "digest0")
    described = (await server.client.get(f"/api/v1/samplers/{sampler}")).json()
    assert described == {"sampler_id": sampler, "base_model": "any:base", "model_path": path}
    await server.call("save_weights_for_sampler", body | {"seq_id": 2})
    assert len(server.engine.adapters) == 1  # the older ones of the path are deleted
    await server.client.delete(f"/api/v1/training_runs/{model}/checkpoints/sampler_weights/final")
    assert not server.engine.adapters


async def test_old_weights_of_sampling_sessions_are_freed(server: StubTrainingApp) -> None:
    session = await server.session()
    model = await server.model(session)
    ids = []
    for seq in range(KEPT_EPHEMERAL + 2):
        body = {"model_id": model, "seq_id": seq + 1, "sampling_session_seq_id": seq}
        ids.append((await server.call("save_weights_for_sampler", body))["sampling_session_id"])
    assert len(set(ids)) == KEPT_EPHEMERAL + 2
    assert len(server.engine.adapters) == KEPT_EPHEMERAL
    assert "were freed" in refusal(await server.send("asample", sample_body(ids[0])))[2]
    assert samples(await server.call("asample", sample_body(ids[-1]))) == [list(b"hell")]
    await server.send(f"sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None})
    assert not server.engine.adapters
    assert not server.engine.runs
    assert list((Path(str(server.engine.info.store)) / "tinker" / "sessions").iterdir()) == []  # type: ignore[union-attr]


async def test_samples(server: StubTrainingApp) -> None:
    given = {"session_id": await server.session(), "sampling_session_seq_id": 0, "base_model": "base"}
    sampler = (await server.ask("create_sampling_session", given))["sampling_session_id"]
    sent = await server.ask("asample", sample_body(sampler, 0, num_samples=3, prompt_logprobs=True))
    assert len(set(sent["sample_sequence_ids"])) == 3
    assert await server.ask("asample", sample_body(sampler, 0, num_samples=3)) == sent
    response = SampleResponse.FromString(await server.result(sent["request_id"]))
    assert [each.stop_reason for each in response.sequences] == [1, 1, 1]
    assert len(response.prompt_logprobs) == 8
    assert [request.sampling.prompt_logprobs for request in server.engine.requests] == [0, None, None]
    params = {"max_tokens": 9, "stop": "ll", "temperature": 0.5, "seed": 7}
    await server.call("asample", sample_body(sampler, 1, num_samples=2, sampling_params=params))
    assert [request.sampling.seed for request in server.engine.requests[3:]] == [7, 8]


@pytest.mark.parametrize(
    ("stop", "tokens", "reason"),
    [
        (None, [*b"hello", 257], 0),  # the model's end
        ("ll", [*b"hell"], 0),
        (["xx", "el"], [*b"hel"], 0),
    ],
)
async def test_tokens_that_end_a_sample_belong_to_it(
    server: StubTrainingApp, stop: Any, tokens: list[int], reason: int
) -> None:
    given = {"session_id": await server.session(), "sampling_session_seq_id": 0, "base_model": "base"}
    sampler = (await server.ask("create_sampling_session", given))["sampling_session_id"]
    params = {"max_tokens": 9} | ({} if stop is None else {"stop": stop})
    response = SampleResponse.FromString(await server.call("asample", sample_body(sampler, sampling_params=params)))
    (sequence,) = response.sequences
    assert memoryview(sequence.tokens).cast("i").tolist() == tokens
    assert (sequence.stop_reason, len(sequence.logprobs)) == (reason, 4 * len(tokens))


async def test_stop_tokens_and_no_stop_at_all(server: StubTrainingApp) -> None:
    given = {"session_id": await server.session(), "sampling_session_seq_id": 0, "base_model": "base"}
    sampler = (await server.ask("create_sampling_session", given))["sampling_session_id"]
    await server.call("asample", sample_body(sampler, 0, sampling_params={"stop": [108, 5]}))
    await server.call("asample", sample_body(sampler, 1, sampling_params={"stop": []}))
    first, second = (request.sampling for request in server.engine.requests)
    assert (first.stop_token_ids, first.ignore_eos, second.stop_token_ids, second.ignore_eos) == (
        (108, 5),
        False,
        (),
        True,
    )


async def test_what_is_wrong_with_a_sample_is_its_result(server: StubTrainingApp) -> None:
    given = {"session_id": await server.session(), "sampling_session_seq_id": 0, "base_model": "base"}
    sampler = (await server.ask("create_sampling_session", given))["sampling_session_id"]
    long = {"chunks": [{"type": "encoded_text", "tokens": [1] * 64}]}
    foreign = {"chunks": [{"type": "encoded_text", "tokens": [9999]}]}
    for seq, (prompt, problem) in enumerate(
        [(long, "maximum context"), (foreign, "token ids"), ({"chunks": []}, "no t")]
    ):
        result = await server.call("asample", sample_body(sampler, seq, prompt=prompt))
        assert problem in result["error"]
    unserved = await server.send("asample", sample_body(sampler, 9, prompt_alt_tokens_k=2))
    assert refusal(unserved)[:2] == (400, "prompt_alt_tokens_k")


async def test_a_sample_waits_for_a_queue_that_is_full(
    server: StubTrainingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_serve.api.tinker.sample_runs.PAUSE", 0.01)
    given = {"session_id": await server.session(), "sampling_session_seq_id": 0, "base_model": "base"}
    sampler = (await server.ask("create_sampling_session", given))["sampling_session_id"]
    server.engine.refusals = {0: Overloaded("full"), 1: Overloaded("full")}
    assert samples(await server.call("asample", sample_body(sampler))) == [list(b"hell")]


async def test_keys_see_their_own_only(keyed: StubTrainingApp) -> None:
    session = await keyed.session("tml-sk-a")
    model = await keyed.model(session, key="tml-sk-a")
    path = (await keyed.call("save_weights", {"model_id": model, "seq_id": 1, "path": "x"}, "tml-sk-a"))["path"]
    body = {"model_id": model, "seq_id": 2, "path": "y"}
    sampler_path = (await keyed.call("save_weights_for_sampler", body, "tml-sk-a"))["path"]
    other = await keyed.session("sk-b")  # without the prefix it is the same key
    for request, sent in [
        ("get_info", {"model_id": model}),
        ("optim_step", step_body(model, 3)),
        ("forward_backward", pass_body(model, 3)),
        ("session_heartbeat", {"session_id": session}),
        ("retrieve_future", {"request_id": f"{model}:1"}),
        ("weights_info", {"tinker_path": path}),
        ("create_sampling_session", {"session_id": other, "sampling_session_seq_id": 0, "model_path": sampler_path}),
    ]:
        assert (await keyed.send(request, sent, "tml-sk-b")).status_code == 404
    assert (await keyed.client.get("/api/v1/checkpoints", headers={"X-API-Key": "tml-sk-b"})).json()[
        "checkpoints"
    ] == []
    loaded = {"session_id": other, "model_seq_id": 0, "path": path, "optimizer": False}
    assert "no checkpoint" in (await keyed.call("load_weights", loaded, "sk-b"))["error"]
    # Nor can the published weights be used by their name, elsewhere.
    (adapter,) = keyed.engine.adapters
    for key, status in (("sk-b", 404), ("sk-a", 200)):
        assert (await keyed.complete(key, adapter=adapter)).status_code == status
    assert (await keyed.send("create_session", {}, "tml-unknown")).status_code == 401


async def test_a_key_without_admin_may_sample_and_not_train(keyed: StubTrainingApp) -> None:
    session = await keyed.session("tml-sk-c")
    body = {"session_id": session, "model_seq_id": 0, "base_model": "base"}
    assert (await keyed.send("create_model", body, "tml-sk-c")).status_code == 403
    given = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "base"}
    sampler = (await keyed.ask("create_sampling_session", given, "tml-sk-c"))["sampling_session_id"]
    assert isinstance(await keyed.call("asample", sample_body(sampler), "tml-sk-c"), bytes)


async def test_a_silent_session_is_ended(server: StubTrainingApp) -> None:
    session = await server.session()
    model = await server.model(session)
    service = server.app.state.tinker
    await service._end_silent()
    assert server.engine.runs
    (own,) = service.sessions("")
    own.last_seen -= 2 * SILENT_SECONDS
    await service._end_silent()
    assert not server.engine.runs
    error = refusal(await server.send("optim_step", step_body(model, 1)))
    assert error[0] == 404
    assert "go on from the last checkpoint" in error[2]


async def test_too_much_that_comes_early_is_to_be_sent_again(
    server: StubTrainingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_calls, "MOST_HELD", 2)
    model = await server.model(await server.session())
    for seq in (3, 4):
        await server.ask("optim_step", step_body(model, seq))
    full = await server.send("optim_step", step_body(model, 5))
    assert (full.status_code, "Retry-After" in full.headers) == (429, True)
    await server.ask("optim_step", step_body(model, 1))  # the one that is awaited is always taken
    await server.call("optim_step", step_body(model, 2))
    await server.call("optim_step", step_body(model, 5))


async def test_results_are_kept_within_bounds() -> None:
    now = 0.0
    results = future_results.FutureResults(kept_bytes=300, kept_seconds=10, clock=lambda: now)
    for id_ in "abc":
        results.open(id_, "me")
        results.finish(id_, future_results.FutureResult("x", bytes(140)))
    assert await results.wait("a", "me", 0) is future_results.LOST
    assert (await results.wait("c", "me", 0)) == future_results.FutureResult("x", bytes(140))
    with pytest.raises(KeyError):
        await results.wait("c", "you", 0)
    now = 61.0
    results.open("d", "me")
    with pytest.raises(KeyError):
        await results.wait("c", "me", 0)
    assert await results.wait("d", "me", 0.001) is None


async def test_telemetry_is_not_read(server: StubTrainingApp) -> None:
    answer = await server.send("telemetry", {"events": [{"x-api-key": "tml-secret"}]})
    assert answer.json() == {"status": "accepted"}
    flags = await server.ask("client/config", {"sdk_version": "1"})
    assert flags["parallel_fwdbwd_chunks"] is False
    assert (await server.ask("client/dynamic_config", {}))["sample_cancel_enabled"] is True
    assert (await server.client.get("/api/v1/get_server_capabilities")).json()["supported_models"][0]["trainable"]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("create_session", {"user_metadata": {"a": "x" * 20_000}}),
        ("create_sampling_session", {"sampling_session_seq_id": 10**18, "base_model": "base"}),
        ("create_sampling_session", {"sampling_session_seq_id": 10**400, "base_model": "base"}),
        ("create_sampling_session", {"sampling_session_seq_id": 1, "base_model": "x" * 300 + ":base"}),
        ("create_model", {"model_seq_id": True, "base_model": "base"}),
        ("optim_step", {"model_id": "m", "seq_id": 10**400}),
        ("optim_step", {"model_id": "m", "seq_id": 1 << 31}),
    ],
)
async def test_what_would_be_kept_has_bounds(server: StubTrainingApp, path: str, more: dict[str, Any]) -> None:
    session = await server.session()
    named = {"session_id": session} if path != "create_session" else {}
    if "model_id" in more:
        more = more | {"model_id": await server.model(session)}
    assert (await server.send(path, named | more)).status_code in (400, 422)


async def test_numbers_that_the_engine_cannot_take_are_refused(server: StubTrainingApp) -> None:
    begun = {"session_id": await server.session(), "sampling_session_seq_id": 0, "base_model": "base"}
    sampler = (await server.ask("create_sampling_session", begun))["sampling_session_id"]
    for wrong in ({"seed": 10**30}, {"top_k": 10**30}, {"max_tokens": 10**30}, {"stop": [10**30]}):
        assert (await server.send("asample", sample_body(sampler, sampling_params=wrong))).status_code in (400, 422)
    last = 10**18 + 1  # of a pickled copy of a sampler
    assert samples(await server.call("asample", sample_body(sampler, last)))


async def test_what_comes_early_waits_within_the_bounds_of_all_models(
    server: StubTrainingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_calls, "ALL_HELD_BYTES", 10)
    session = await server.session()
    models = [await server.model(session, number) for number in range(2)]
    for model in models:
        assert (await server.send("optim_step", step_body(model, 2))).status_code == 429
        await server.call("optim_step", step_body(model, 1))


async def test_a_session_that_cannot_be_read_whole_does_not_go_on_in_part(tmp_path: Path) -> None:
    async with StubTrainingApp(tmp_path) as server:
        session = await server.session()
        models = [await server.model(session, number) for number in range(2)]
    bad = tmp_path / "tinker" / "sessions" / session / "models" / "1" / "journal"
    good = bad.read_bytes()
    bad.unlink()
    bad.mkdir()
    async with StubTrainingApp(tmp_path) as server:
        for _ in range(2):
            assert (await server.send("optim_step", step_body(models[0], 1))).status_code == 404
        assert not server.engine.runs
        bad.rmdir()
        bad.write_bytes(good)
        for model in models:
            await server.train(model, 1)
        assert len(server.engine.passes) == 2


async def test_a_call_that_the_disk_has_altered_is_not_carried_out(tmp_path: Path) -> None:
    async with StubTrainingApp(tmp_path) as server:
        session = await server.session()
        model = await server.model(session)
        await server.train(model, 1, 2.0)
        await server.train(model, 2, 3.0)
    journal = tmp_path / "tinker" / "sessions" / session / "models" / "0" / "journal"
    data = journal.read_bytes()
    number = data.rindex(b"\x00\x00\x40\x40")  # the 3.0
    journal.write_bytes(data[:number] + bytes(4) + data[number + 4 :])
    async with StubTrainingApp(tmp_path) as server:
        assert (await server.step(model, 2))["metrics"]["grad_norm:mean"] == 2.0


async def test_many_freed_sampling_sessions_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_sessions, "KEPT_FREED", 3)
    monkeypatch.setattr(sampling_sessions, "NEEDLESS_LINES", 20)
    sessions = sampling_sessions.SamplingSessions(tmp_path)
    freed = [
        adapter
        for number in range(100)
        for adapter in sessions.add(
            sampling_sessions.SamplingSession(f"s{number}", "base", adapter=f"a{number}", model_id="m")
        )
    ]
    assert freed == [f"a{number}" for number in range(100 - KEPT_EPHEMERAL)]
    again = sampling_sessions.SamplingSessions(tmp_path)
    assert {each.id for each in sessions} == {f"s{number}" for number in range(100 - KEPT_EPHEMERAL - 3, 100)}
    assert {each.id for each in again} >= {each.id for each in sessions}
    assert (tmp_path / "samplers").read_bytes().count(b"\n") < 60


async def test_what_a_killed_server_left_is_removed(tmp_path: Path) -> None:
    async with StubTrainingApp(tmp_path) as server:
        service, engine = server.app.state.tinker, server.engine
        session = await server.session()
        model = await server.model(session)
        for seq, more in ((1, {"sampling_session_seq_id": 0}), (2, {"path": "kept"})):
            await server.call("save_weights_for_sampler", {"model_id": model, "seq_id": seq, **more})
        needed = {name for name in engine.adapters if name.startswith("tinker-")}
        run = server.app.state.tinker._sessions[session].find_model(0).run
        left = (await service.weights.publish(run, "", durable=False)).adapter  # killed before it was written down
        gone, young = (tmp_path / "tinker" / "sessions" / (each * 32) for each in "ab")
        for folder in (gone, young):
            (folder / "models" / "0" / "state-3").mkdir(parents=True)
        os.utime(gone, (1, 1))
        service._started -= 2 * SILENT_SECONDS
        for _ in range(2):
            await service._remove_left()
            await service._remove_needless()
            assert (gone.exists(), young.exists()) == (False, True)
            assert {name for name in engine.adapters if name.startswith("tinker-")} == {*needed, left}
        service._needless._seen[left] -= SILENT_SECONDS
        await service._remove_needless()
        assert {name for name in engine.adapters if name.startswith("tinker-")} == needed


async def test_a_session_that_is_ending_does_not_go_on(server: StubTrainingApp) -> None:
    session = await server.session()
    model = await server.model(session)
    server.engine.gate = asyncio.Event()
    await server.ask("forward_backward", pass_body(model, 1))
    asked = [server.send(f"sessions/{session}/finish", {}), server.send("session_heartbeat", {"session_id": session})]
    answers = await asyncio.gather(*asked)
    assert (answers[0].status_code, answers[1].status_code in (200, 404)) == (200, True)
    assert not server.app.state.tinker.sessions("")
    assert not server.engine.runs


async def test_samples_of_one_key_leave_space_for_those_of_others(
    keyed: StubTrainingApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_runs, "MOST_OF_KEY", 3)
    monkeypatch.setattr(sample_runs, "MOST_TOKENS", 8)
    runs = keyed.app.state.tinker.samples
    held = [runs._at_once.slot("other") for _ in range(runs._at_once._free)]
    for slot in held:
        await slot.__aenter__()
    samplers = {}
    for key in ("tml-sk-a", "tml-sk-c"):
        begun = {"session_id": await keyed.session(key), "sampling_session_seq_id": 0, "base_model": "base"}
        samplers[key] = (await keyed.ask("create_sampling_session", begun, key))["sampling_session_id"]

    async def begin(key: str, seq: int, tokens: int) -> int:
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [104] * tokens}]}
        return (await keyed.send("asample", sample_body(samplers[key], seq, prompt=prompt), key)).status_code

    assert [await begin("tml-sk-a", seq, tokens) for seq, tokens in enumerate((2, 3, 1, 1, 1))] == [
        200,
        429,
        200,
        200,
        429,
    ]
    assert [await begin("tml-sk-c", seq, 2) for seq in range(3)] == [200, 200, 429]
    for slot in held:
        await slot.__aexit__(None, None, None)
    for key, seqs in (("tml-sk-a", (0, 2, 3)), ("tml-sk-c", (0, 1))):
        for seq in seqs:
            assert samples(await keyed.result(f"{samplers[key]}:{seq}", key))
    assert not runs._requests
    assert not runs._tokens


async def test_results_beyond_the_bound_cost_no_more_than_others() -> None:
    results = future_results.FutureResults(kept_bytes=1000)
    for number in range(3000):
        results.open(f"{number}", "me")
        results.finish(f"{number}", future_results.FutureResult("x", bytes(200)))
    lost = [id_ for id_ in results._entries if (await results.wait(id_, "me", 0)) is future_results.LOST]
    assert len(lost) >= 2990
    assert len(results._whole) <= 5


async def test_nothing_is_published_under_the_names_of_sampling_weights(server: StubTrainingApp) -> None:
    name = private_adapter("")
    for path in (f"/v1/adapters/{name}", f"/v1/aliases/{name}"):
        answer = await server.client.put(path, json={"source": "support", "targets": [{"adapter": "poet"}]})
        assert answer.status_code in (400, 422)
        assert not any(each.startswith("tinker-") for each in (*server.engine.adapters, *server.engine.aliases))
    assert (
        "the server itself publishes"
        in refusal(await server.client.put(f"/v1/aliases/{name}", json={"targets": [{"adapter": "poet"}]}))[2]
    )
