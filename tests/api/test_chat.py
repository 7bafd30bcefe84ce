"""`/v1/chat/completions`, `/v1/models`, `/tokenize`: the base's template and tokenizer, and the list of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stub_completions import CONTEXT, StubCompletionApp, byte_tokenizer, events

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.messages import AdapterInfo, AdapterVersion


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    return StubCompletionApp(tmp_path)


async def test_a_chat_completion_has_openai_s_shape(server: StubCompletionApp) -> None:
    answer = (await server.chat(adapter="poet")).json()
    assert answer["object"] == "chat.completion"
    assert (answer["model"], answer["adapter"]) == ("poet", "poet@" + "d" * 12)
    message = {"role": "assistant", "content": "hello", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    prompt = server.engine.requests[0].prompt
    assert bytes(prompt) == b"user:hi|assistant:"
    assert server.engine.requests[0].sampling.max_tokens == CONTEXT - len(prompt)


async def test_text_parts_are_joined_and_the_last_message_can_be_continued(server: StubCompletionApp) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await server.chat(messages=[{"role": "user", "content": parts}])
    assert bytes(server.engine.requests[0].prompt) == b"user:ab|assistant:"
    await server.chat(messages=[{"role": "user", "content": "a"}], add_generation_prompt=False)
    assert bytes(server.engine.requests[1].prompt) == b"user:a|"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Once"}]
    await server.chat(messages=turns, continue_final_message=True)
    assert bytes(server.engine.requests[2].prompt) == b"user:a|assistant:Once"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", [{"role": "robot", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": "x" * 100}]),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "yaml"}),
        ("functions", [{"name": "f"}]),
        ("store", True),
        ("modalities", ["audio"]),
        ("max_completion_tokens", 0),
        ("top_logprobs", 21),
        ("chat_template_kwargs", {"code": "x"}),
        ("chat_template", "{{ 1 }}"),
        ("n", 99),
    ],
)
async def test_a_bad_field_is_400_and_named(server: StubCompletionApp, field: str, value: Any) -> None:
    answer = await server.chat(**{field: value})
    assert answer.status_code == 400, answer.text
    param = (answer.json()["error"]["param"] or "").split(".")[0]
    assert param == field


async def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, tokenizer=byte_tokenizer(template=None))
    answer = await server.chat()
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]


async def test_messages_that_the_template_rejects_are_400(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, tokenizer=byte_tokenizer(template="{{ raise_exception('users first') }}"))
    answer = await server.chat()
    assert answer.status_code == 400
    assert "users first" in answer.json()["error"]["message"]


async def test_logprobs_contain_tokens_and_bytes(server: StubCompletionApp) -> None:
    server.engine.reply = "é".encode()
    answer = (await server.chat(logprobs=True, top_logprobs=1)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [*b"</s>"]]
    assert content[0]["logprob"] == -0.1 * 0xC3
    assert len(content[0]["top_logprobs"]) == 1


async def test_a_chat_stream_begins_with_the_role_and_ends_with_a_reason(server: StubCompletionApp) -> None:
    chunks = events(await server.chat(stream=True, n=2, stream_options={"include_usage": True}))
    deltas: list[list[dict[str, Any]]] = [[], []]
    for chunk in chunks[:-1]:
        deltas[chunk["choices"][0]["index"]].append(chunk["choices"][0]["delta"])
    assert [each[0] for each in deltas] == [{"role": "assistant", "content": ""}] * 2
    assert ["".join(delta.get("content", "") for delta in each) for each in deltas] == ["hello", "hello"]
    assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in chunks[:-1]) == 2
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


# --- models ----------------------------------------------------------------------------------------------------------


def published(server: StubCompletionApp, *names: str) -> None:
    version = AdapterVersion("d" * 64, 5.5, 8, 2, 10, 10, ["disk"], 0)
    server.engine.adapters = {name: AdapterInfo(name, False, [version]) for name in names}


async def test_the_base_is_listed_first_then_its_adapters(server: StubCompletionApp) -> None:
    published(server, "poet", "clerk")
    found = (await server.client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["parent"]) for model in found] == [("base", None), ("clerk", "base"), ("poet", "base")]
    assert found[0] | {"created": 7, "root": "root", "max_model_len": CONTEXT} == found[0]
    assert (await server.client.get("/v1/models/poet")).json() == found[2]
    assert (await server.client.get("/v1/models/base:poet")).json() == found[2]
    for name in ("nobody", "base:nobody", "base:", "poet:base"):
        missing = await server.client.get(f"/v1/models/{name}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_models_that_a_key_may_not_use_are_not_listed(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, Keys({hash_key("k"): Caller("alice", adapters=("cl*",))}))
    published(server, "poet", "clerk")
    headers = {"Authorization": "Bearer k"}
    found = (await server.client.get("/v1/models", headers=headers)).json()["data"]
    assert [model["id"] for model in found] == ["base", "clerk"]
    for name in ("poet", "base:poet"):
        assert (await server.client.get(f"/v1/models/{name}", headers=headers)).status_code == 404


# --- tokens ----------------------------------------------------------------------------------------------------------


async def test_text_and_messages_are_tokenized_and_detokenized(server: StubCompletionApp) -> None:
    text = (await server.post("/tokenize", {"prompt": "hé"})).json()
    assert text == {"count": 3, "max_model_len": CONTEXT, "tokens": [*"hé".encode()]}
    turns = (await server.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]})).json()
    assert bytes(turns["tokens"]) == b"user:a|assistant:"
    assert (await server.post("/detokenize", {"tokens": text["tokens"]})).json() == {"prompt": "hé"}
    assert (await server.post("/detokenize", {"tokens": [999]})).status_code == 400
    assert (await server.post("/tokenize", {})).status_code == 400
    assert (await server.client.get("/tokenizer_info")).json()["eos_token"] == "</s>"


@pytest.mark.parametrize(
    ("selection", "code"),
    [
        ({"model": "poetry"}, "model_not_found"),
        ({"model": "base:poetry"}, "model_not_found"),
        ({"adapter": "nobody"}, "adapter_not_found"),
        ({"adapter": "poet@fff"}, "adapter_not_found"),
    ],
)
@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})])
async def test_tokens_of_an_unknown_model_are_404(
    server: StubCompletionApp, path: str, body: dict[str, Any], selection: dict[str, str], code: str
) -> None:
    published(server, "poet")
    answer = await server.post(path, body | selection)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)
    if selection == {"model": "poetry"}:
        assert answer.json()["error"]["message"].endswith("did you mean poet?")
    for known in ({"model": "base"}, {"model": "poet"}, {"model": "base:poet"}, {"adapter": "poet@ddd"}, {}):
        assert (await server.post(path, body | known)).status_code == 200


async def test_an_adapter_s_own_vocabulary_decides_which_token_ids_there_are(server: StubCompletionApp) -> None:
    version = AdapterVersion("d" * 64, 5.5, 8, 2, 10, 10, ["disk"], 0, vocab_size=300)
    server.engine.adapters = {"poet": AdapterInfo("poet", False, [version])}
    for tokens, selection, status in (
        ([97, 299], {"adapter": "poet"}, 200),
        ([97, 300], {"adapter": "poet"}, 400),
        ([97, 299], {}, 400),
    ):
        assert (await server.post("/detokenize", {"tokens": tokens, **selection})).status_code == status


async def test_tokens_of_an_adapter_that_a_key_may_not_use_are_404(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, Keys({hash_key("k"): Caller("alice", adapters=("cl*",))}))
    published(server, "poet", "clerk")
    assert (await server.post("/tokenize", {"prompt": "a", "model": "poet"}, "k")).status_code == 404
    assert (await server.post("/tokenize", {"prompt": "a", "model": "clerk"}, "k")).status_code == 200
