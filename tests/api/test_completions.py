"""`/v1/completions`: accepted requests, refused ones, and the exact responses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from stub_completions import CONTEXT, EOS, StubCompletionApp, byte_tokenizer, events

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.errors import AdapterNotFound, Overloaded, Unavailable
from lora_serve.messages import AdapterInfo, AdapterVersion
from lora_serve.request import AdapterUse


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    return StubCompletionApp(tmp_path)


async def test_a_completion_has_openai_s_shape(server: StubCompletionApp) -> None:
    server.engine.cached = 1
    answer = (await server.complete()).json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 0
    assert answer == {
        "object": "text_completion",
        "model": "base",
        "choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }  # fmt: skip
    assert server.engine.requests[0].prompt == [*b"hi"]
    assert server.engine.requests[0].sampling.max_tokens == 16


async def test_the_priority_and_the_share_of_the_key_reach_the_engine(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, Keys({hash_key("any"): Caller("large", share=3.0)}))
    assert (await server.complete(priority=-2)).status_code == 200
    assert (await server.chat(priority=5)).status_code == 200
    assert [(each.tenant, each.priority, each.weight) for each in server.engine.requests] == [
        ("large", -2, 3.0),
        ("large", 5, 3.0),
    ]


REFUSED: dict[str, tuple[Any, ...]] = {
    "temperature": (-1, 3, "1", True),
    "top_p": (0, 1.5),
    "top_k": (-2, 1.5),
    "min_p": (2,),
    "n": (0, 1.5, 1000),
    "seed": ("a", 2**70),
    "max_tokens": (-1, "5"),
    "min_tokens": (-1,),
    "logprobs": (21, -1, True),
    "stop": ([""] , "", ["a"] * 5, "x" * 257, 5),
    "stop_token_ids": ([-1], ["a"], [258]),
    "logit_bias": ({"x": 1}, {"1": 101}, {"258": 1}, {str(i): 0 for i in range(1025)}),
    "presence_penalty": (3,),
    "frequency_penalty": (-3,),
    "repetition_penalty": (0,),
    "adapter": (5, "", [], {"name": "poet", "weight": 1000}, [{"name": "poet"}] * 9, "poet@"),
    "best_of": (2,),
    "response_format": ({"type": "yaml"}, {"type": "json_schema"}, "json"),
    "stream": ("yes",),
    "echo": (1,),
    "prompt": ([], [[]], "", [258], [-1], 5, [1, "a"], None),
    "suffix": ("x",),
    "tools": ([],),
    "whatever": (1,),
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
async def test_a_bad_field_is_400_and_named(server: StubCompletionApp, field: str, value: Any) -> None:
    answer = await server.complete(**{field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert (error["param"] or "").split(".")[0] == field
    assert error["type"] == "invalid_request_error"
    assert server.engine.requests == []


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"prompt": "x", "temperature": NaN}', b""])
async def test_a_body_that_is_not_a_json_object_is_400(server: StubCompletionApp, body: bytes) -> None:
    answer = await server.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_every_optional_field_may_be_null(server: StubCompletionApp) -> None:
    fields = [
        "model", "adapter", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stop_token_ids",
        "include_stop_str_in_output", "ignore_eos", "min_tokens", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "stream", "stream_options", "response_format", "user", "max_tokens",
        "echo", "logprobs", "best_of", "add_special_tokens",
    ]  # fmt: skip
    assert (await server.complete(**dict.fromkeys(fields))).status_code == 200


async def test_sampling_parameters_are_passed_to_the_engine(server: StubCompletionApp) -> None:
    await server.complete(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=3, max_tokens=4, min_tokens=2, logit_bias={"7": -2},
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, stop_token_ids=[9], ignore_eos=True,
    )  # fmt: skip
    params = server.engine.requests[0].sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.seed, params.max_tokens, params.min_tokens) == (3, 4, 2)
    assert (params.logit_bias, params.stop_token_ids, params.ignore_eos) == ({7: -2.0}, (9,), True)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)


async def test_token_ids_of_an_adapter_s_vocabulary_are_checked_by_the_engine(server: StubCompletionApp) -> None:
    asked = {"prompt": [300, 5], "logit_bias": {"301": 1}, "stop_token_ids": [302], "echo": True, "logprobs": 1}
    for named in ({"adapter": "poet"}, {"model": "poet"}, {"adapter": [{"name": "poet", "weight": 0.5}]}):
        assert (await server.complete(**asked, **named)).status_code == 200
        assert server.engine.requests[-1].prompt == [300, 5]
    answer = await server.complete(prompt=[1 << 31], adapter="poet")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


async def test_choices_are_numbered_prompt_by_prompt_and_each_has_its_own_seed(
    server: StubCompletionApp,
) -> None:
    answer = (await server.complete(prompt=["a", "bb"], n=2, seed=10)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    asked = [(bytes(request.prompt), request.sampling.seed) for request in server.engine.requests]
    assert asked == [(b"a", 10), (b"a", 11), (b"bb", 10), (b"bb", 11)]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 4 * 6


@pytest.mark.parametrize(("prompt", "count"), [([104, 105], 1), ([[104], [105, 106]], 2)])
async def test_token_ids_are_passed_unchanged(tmp_path: Path, prompt: Any, count: int) -> None:
    server = StubCompletionApp(tmp_path, tokenizer=byte_tokenizer(bos=True))
    await server.complete(prompt=prompt)
    assert [request.prompt for request in server.engine.requests] == (prompt if count == 2 else [prompt])
    await server.complete(prompt="h")
    assert server.engine.requests[-1].prompt == [256, 104]
    await server.complete(prompt="h", add_special_tokens=False)
    assert server.engine.requests[-1].prompt == [104]
    await server.complete(prompt="", add_special_tokens=False)
    assert server.engine.requests[-1].prompt == [256]


async def test_echo_with_logprobs_has_the_form_that_evaluation_harnesses_read(server: StubCompletionApp) -> None:
    body = {"prompt": [[104, 105]], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choice = (await server.complete(**body)).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hih"
    assert logprobs["tokens"] == ["h", "i", "h"]
    assert logprobs["token_logprobs"] == [None, -0.1 * 105, -0.1 * 104]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][0] is None
    for token, value, top in zip(
        logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
    ):
        assert top[token] == value
        assert len(top) == 2


async def test_a_generated_end_token_has_an_entry_so_that_entries_are_prompt_plus_generated(
    server: StubCompletionApp,
) -> None:
    server.engine.reply = b""
    body = {"prompt": [[104, 105]], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = (await server.complete(**body)).json()
    assert answer["choices"][0]["text"] == "hi"
    assert answer["choices"][0]["finish_reason"] == "stop"
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "i", "</s>"]
    assert logprobs["token_logprobs"] == [None, -0.1 * 105, -0.1 * EOS]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 1
    chunks = events(await server.complete(stream=True, logprobs=0, prompt="x"))
    assert [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]] == ["</s>"]


async def test_max_tokens_0_with_echo_returns_the_prompt_s_logprobs(server: StubCompletionApp) -> None:
    choice = (await server.complete(prompt="hi", echo=True, logprobs=0, max_tokens=0)).json()["choices"][0]
    assert choice["text"] == "hi"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.1 * 105]


async def test_tokens_that_are_incomplete_characters_are_distinguished_by_their_bytes(
    server: StubCompletionApp,
) -> None:
    server.engine.reply = "é".encode()
    choice = (await server.complete(logprobs=0)).json()["choices"][0]
    assert choice["text"] == "é"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "</s>"]


async def test_a_stop_string_truncates_the_text_and_aborts_the_request(server: StubCompletionApp) -> None:
    server.engine.reply = b"one two three"
    answer = (await server.complete(stop=["tw", "zzz"], max_tokens=30)).json()
    assert answer["choices"][0]["text"] == "one "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert len(server.engine.closed) == 1
    kept = (await server.complete(stop="tw", include_stop_str_in_output=True)).json()
    assert kept["choices"][0]["text"] == "one tw"


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "uses", "model"),
    [
        ({"adapter": "poet"}, (AdapterUse("poet"),), "poet"),
        ({"adapter": "poet@dd"}, (AdapterUse("poet", "dd"),), "poet"),
        ({"model": "poet"}, (AdapterUse("poet"),), "poet"),
        ({"model": "base", "adapter": "poet"}, (AdapterUse("poet"),), "poet"),
        ({"model": "poet", "adapter": "poet"}, (AdapterUse("poet"),), "poet"),
        ({"adapter": {"name": "poet", "weight": 0.5}}, (AdapterUse("poet", None, 0.5),), "poet"),
        (
            {"adapter": [{"name": "poet", "weight": 0.5}, {"name": "clerk"}]},
            (AdapterUse("poet", None, 0.5), AdapterUse("clerk")),
            "poet+clerk",
        ),
        (
            {"adapter": [{"name": "poet", "weight": 0.5}, {"name": "clerk"}, {"name": "poet"}]},
            (AdapterUse("poet", None, 1.5), AdapterUse("clerk")),
            "poet+clerk",
        ),
        ({"model": "base:poet@dd"}, (AdapterUse("poet", "dd"),), "poet"),
        ({"model": "base"}, (), "base"),
        ({}, (), "base"),
    ],
)
async def test_adapters_can_be_given_in_several_forms(
    server: StubCompletionApp, fields: dict[str, Any], uses: tuple[AdapterUse, ...], model: str
) -> None:
    answer = (await server.complete(**fields)).json()
    assert server.engine.requests[0].adapters == uses
    assert answer["model"] == model
    shown = [f"{use.name}@{'d' * 12}" for use in uses]
    assert answer.get("adapter") == (shown[0] if len(shown) == 1 else shown or None)


async def test_contradictory_model_and_adapter_are_refused(server: StubCompletionApp) -> None:
    answer = await server.complete(model="clerk", adapter="poet")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "adapter"


@pytest.mark.parametrize("model", ["poetry", "base:poetry"])
async def test_an_unknown_model_is_named_with_what_it_resembles(server: StubCompletionApp, model: str) -> None:
    version = AdapterVersion("d" * 64, 5.5, 8, 2, 10, 10, ["disk"], 0)
    server.engine.adapters = {"poet": AdapterInfo("poet", False, [version])}
    answer = await server.complete(model=model)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["message"] == f"model {model} does not exist; did you mean poet?"
    error = (await server.complete(adapter="poetry")).json()["error"]
    assert (error["code"], error["param"]) == ("adapter_not_found", "adapter")
    assert "did you mean poet?" in error["message"]


async def test_an_adapter_that_a_key_may_not_use_looks_like_one_that_does_not_exist(tmp_path: Path) -> None:
    keys = Keys({hash_key("k"): Caller("alice", adapters=("clerk",))})
    server = StubCompletionApp(tmp_path, keys)
    hidden = await server.complete("k", adapter="poet")
    absent = await server.complete("k", adapter="clerk2")
    assert (hidden.status_code, absent.status_code) == (404, 404)
    assert hidden.json()["error"] == {
        "message": "adapter poet does not exist", "type": "not_found_error", "param": "adapter",
        "code": "adapter_not_found",
    }  # fmt: skip
    assert (await server.complete("k", adapter="clerk")).status_code == 200
    assert server.engine.requests[-1].tenant == "alice"
    for path, body in (("/v1/completions", {"prompt": "hi"}), ("/v1/embeddings", {"input": "hi"})):
        errors = [(await server.post(path, body | {"model": name}, "k")).json()["error"] for name in ("poet", "absent")]
        assert errors[0] == errors[1] | {"message": "model poet does not exist"}
        assert errors[0]["code"] == "model_not_found"


# --- refusals by the engine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (Overloaded("full", retry_after=2), 429, "2"),
        (Unavailable("not now"), 503, "1"),
        (AdapterNotFound("no"), 404, None),
    ],
)
async def test_a_refusal_by_the_engine_sets_the_http_status(
    server: StubCompletionApp, error: Any, status: int, retry: str | None, stream: bool
) -> None:
    server.engine.refusals = {0: error}
    answer = await server.complete(stream=stream)
    assert answer.status_code == status
    assert answer.headers.get("Retry-After") == retry
    assert answer.json()["error"]["message"] == error.message


async def test_one_refused_choice_ends_the_others(server: StubCompletionApp) -> None:
    server.engine.refusals = {1: Overloaded("full")}
    server.engine.forever = True
    assert (await server.complete(n=3)).status_code == 429
    assert sorted(server.engine.closed) == sorted(request.id for request in server.engine.requests)


async def test_a_call_with_more_choices_than_the_queue_takes_is_served_in_turns(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, max_queue=3)
    answer = (await server.complete(prompt=[f"{n}" for n in range(20)], n=2)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(40))
    assert {choice["text"] for choice in answer["choices"]} == {"hello"}
    assert server.engine.most_at_once == 3
    texts = [""] * 20
    for chunk in events(await server.complete(prompt=[f"{n}" for n in range(20)], stream=True)):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["hello"] * 20
    assert len(server.engine.closed) == 60


async def test_all_choices_of_a_call_are_served_by_one_version(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, max_queue=2)
    await server.complete(n=6, adapter="poet")
    versions = [request.adapters[0].version for request in server.engine.requests]
    assert versions == [None, None, *["d" * 64] * 4]


async def test_a_choice_refused_in_its_turn_ends_the_call(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, max_queue=2)
    server.engine.refusals = {7: Overloaded("full")}
    assert (await server.complete(n=16)).status_code == 429
    assert sorted(server.engine.closed) == sorted(request.id for request in server.engine.requests)


@pytest.mark.parametrize("body", [{"prompt": "x" * CONTEXT}, {"prompt": "x" * 10, "max_tokens": CONTEXT}])
async def test_a_request_beyond_the_context_length_is_refused_before_the_engine_sees_it(
    server: StubCompletionApp, body: dict[str, Any]
) -> None:
    answer = await server.complete(**body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert server.engine.requests == []


async def test_the_default_max_tokens_is_limited_by_the_context_length(server: StubCompletionApp) -> None:
    assert (await server.complete(prompt="x" * (CONTEXT - 3))).status_code == 200
    assert server.engine.requests[0].sampling.max_tokens == 3


async def test_a_stopped_choice_is_aborted_while_others_continue(server: StubCompletionApp) -> None:
    server.engine.reply = b"ab"
    server.engine.forever = True
    async with asyncio.timeout(5):
        asking = asyncio.ensure_future(server.complete(prompt=["x", "y"], stop="ab"))
        await asking
    assert len(server.engine.closed) == 2


async def test_an_error_during_generation_is_the_response(server: StubCompletionApp) -> None:
    server.engine.breaks = 2
    answer = await server.complete()
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "it broke"


# --- streams ---------------------------------------------------------------------------------------------------------


async def test_a_stream_has_text_chunks_then_usage_then_done(server: StubCompletionApp) -> None:
    chunks = events(await server.complete(stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in pieces) == "hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in pieces] == [None] * 5 + ["stop"]
    assert all(chunk["usage"] is None for chunk in pieces)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6


async def test_usage_can_be_included_in_every_chunk(server: StubCompletionApp) -> None:
    chunks = events(await server.complete(stream=True, stream_options={"continuous_usage_stats": True}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6]


async def test_a_plain_stream_has_no_usage(server: StubCompletionApp) -> None:
    assert all("usage" not in chunk for chunk in events(await server.complete(stream=True)))


async def test_several_choices_are_streamed_concurrently_each_with_its_echo(server: StubCompletionApp) -> None:
    texts: dict[int, str] = {}
    for chunk in events(await server.complete(prompt=["a", "b"], n=2, echo=True, stream=True)):
        choice = chunk["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "ahello", 1: "ahello", 2: "bhello", 3: "bhello"}


async def test_a_character_split_over_tokens_is_streamed_in_one_chunk(server: StubCompletionApp) -> None:
    server.engine.reply = "a漢b".encode()
    pieces = [chunk["choices"][0]["text"] for chunk in events(await server.complete(stream=True))]
    assert pieces == ["a", "", "", "漢", "b", ""]


async def test_a_possible_stop_string_is_held_back_and_flushed(server: StubCompletionApp) -> None:
    server.engine.reply = b"a STO b"
    pieces = [chunk["choices"][0]["text"] for chunk in events(await server.complete(stream=True, stop="STOP"))]
    assert "".join(pieces) == "a STO b"
    assert "S" not in pieces


async def test_an_error_in_a_stream_is_sent_as_an_event(server: StubCompletionApp) -> None:
    server.engine.breaks = 2
    chunks = events(await server.complete(stream=True))
    assert chunks[-1]["error"]["message"] == "it broke"
    assert "choices" not in chunks[-1]


async def test_the_end_token_is_counted_but_not_in_the_text(server: StubCompletionApp) -> None:
    answer = (await server.complete(max_tokens=5)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5
    assert EOS not in server.engine.requests[0].prompt


@pytest.mark.parametrize("model", ["x" * 400, "base:", "base:" + "x" * 300, "@x", "x@" + "y" * 300])
async def test_a_model_of_any_length_is_unknown_rather_than_a_fault(server: StubCompletionApp, model: str) -> None:
    answer = await server.complete(model=model)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert len(answer.json()["error"]["message"]) < 300
