"""The OpenAPI schema is what the server does: real responses of every route match their documented schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from stub_admin import FILES, adapter_folder
from stub_completions import StubCompletionApp

from lora_serve.messages import AdapterFiles, AliasInfo, AliasTarget

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
MESSAGE = {"model": "base", "max_tokens": 4, **CHAT}
KEYLESS = {"/health", "/ready"}


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    adapter_folder(tmp_path / "roots" / "clerk")
    return StubCompletionApp(tmp_path / "store", adapter_roots=[tmp_path / "roots"])


def operations(schema: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Operations by method and path."""
    return {(method, path): found for path, methods in schema["paths"].items() for method, found in methods.items()}


def check(schema: dict[str, Any], method: str, path: str, answer: httpx.Response) -> None:
    """Assert that a response has a documented status, media type and body."""
    documented = operations(schema)[method, path]["responses"]
    status = str(answer.status_code)
    content = documented.get(status, documented.get(f"{status[0]}XX"))["content"]
    media = answer.headers["Content-Type"].partition(";")[0]
    if media == "application/json":
        whole = content[media]["schema"] | {"components": schema["components"]}
        jsonschema.validate(answer.json(), whole, jsonschema.Draft202012Validator)
    else:
        assert content[media]["schema"]["type"] == "string"


def test_every_response_and_error_is_documented(server: StubCompletionApp) -> None:
    schema = server.app.openapi()
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for (method, path), operation in operations(schema).items():
        responses = operation["responses"]
        (success,) = (status for status in responses if status.startswith("2"))
        assert all(content["schema"] for content in responses[success]["content"].values()), path
        expected = {"500", "503"} | ({"400", "413", "415"} if "requestBody" in operation else set())
        assert "4XX" in responses or expected <= responses.keys(), f"{method} {path}"
        assert ("security" in operation) == (path not in KEYLESS)
        assert ("401" in responses or "4XX" in responses) == (path not in KEYLESS)
        for status, documented in responses.items():
            if status >= "4" and not path.startswith("/v1/messages"):
                assert documented["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorReply")
    kinds = {(scheme["type"], scheme.get("scheme")) for scheme in schema["components"]["securitySchemes"].values()}
    assert kinds == {("http", "bearer"), ("apiKey", None)}


@pytest.mark.parametrize("adapter", [None, "poet"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": ["hi", "ho"], "logprobs": 2, "echo": True}),
        ("/v1/completions", {"prompt": "hi", "stream": True}),
        ("/v1/completions", {"prompt": 5}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "n": 2}),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/chat/completions", CHAT | {"model": "nobody"}),
        ("/v1/messages", MESSAGE),
        ("/v1/messages", MESSAGE | {"stream": True}),
        ("/v1/messages", MESSAGE | {"max_tokens": 0}),
        ("/v1/messages/count_tokens", MESSAGE),
        ("/v1/embeddings", {"input": "hi"}),
        ("/v1/embeddings", {"input": ["hi"], "encoding_format": "base64"}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [97]}),
        ("/detokenize", {"tokens": [999]}),
    ],
)
async def test_responses_of_generating_and_tokenizing_routes_are_as_documented(
    server: StubCompletionApp, path: str, body: dict[str, Any], adapter: str | None
) -> None:
    await server.client.put("/v1/adapters/poet", files=[("files", item) for item in FILES.items()])
    answer = await server.post(path, body | ({"adapter": adapter} if adapter else {}))
    check(server.app.openapi(), "post", path, answer)


async def test_a_tool_call_is_as_documented(server: StubCompletionApp) -> None:
    server.engine.reply = b'<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    answer = await server.post("/v1/chat/completions", CHAT | {"tools": tools, "max_tokens": 60})
    check(server.app.openapi(), "post", "/v1/chat/completions", answer)


@pytest.mark.parametrize(
    ("method", "path", "given"),
    [
        ("get", "/v1/models", {}),
        ("get", "/v1/models/{model}", {}),
        ("get", "/tokenizer_info", {}),
        ("get", "/v1/adapters", {}),
        ("get", "/v1/adapters/{name}", {}),
        ("post", "/v1/adapters", {"files": [("name", (None, "new")), *[("files", item) for item in FILES.items()]]}),
        ("post", "/v1/adapters", {"files": [("name", (None, "poet")), *[("files", item) for item in FILES.items()]]}),
        ("post", "/v1/adapters", {"json": {}}),
        ("post", "/v1/adapters/inspect", {"files": [("files", item) for item in FILES.items()]}),
        ("put", "/v1/adapters/{name}", {"files": [("files", item) for item in FILES.items()]}),
        ("post", "/v1/adapters/{name}/load", {}),
        ("post", "/v1/adapters/{name}/evict", {}),
        ("post", "/v1/adapters/{name}/pin", {}),
        ("post", "/v1/adapters/{name}/unpin", {}),
        ("put", "/v1/adapters/{name}", {"files": [], "headers": {"If-Match": "x"}}),
        ("get", "/v1/adapters/{name}/files", {}),
        ("delete", "/v1/adapters/{name}", {}),
        ("delete", "/v1/adapters/{name}", {"headers": {"If-Match": "x"}}),
        ("put", "/v1/aliases/{name}", {"json": {"targets": [{"adapter": "poet"}], "sticky": "header:X-Session"}}),
        ("put", "/v1/aliases/{name}", {"json": {"targets": []}}),
        ("put", "/v1/aliases/{name}", {"json": {"targets": [{"adapter": "x"}]}, "headers": {"If-Match": "x"}}),
        ("get", "/v1/aliases", {}),
        ("get", "/v1/aliases/{name}", {}),
        ("delete", "/v1/aliases/{name}", {}),
        ("post", "/v1/unload_lora_adapter", {"json": {"lora_name": "nobody"}}),
        ("post", "/v1/unload_lora_adapter", {"json": {}, "headers": {"Content-Type": "text/plain"}}),
        ("post", "/unload_lora_adapter", {"json": {"lora_name": "poet"}}),
        ("get", "/health", {}),
        ("get", "/ready", {}),
        ("get", "/ready", {"headers": {"Origin": "null"}}),
        ("get", "/metrics", {}),
        ("get", "/v1/key", {}),
    ],
)
async def test_responses_of_the_other_routes_are_as_documented(
    server: StubCompletionApp, tmp_path: Path, method: str, path: str, given: dict[str, Any]
) -> None:
    await server.client.put("/v1/adapters/poet", files=[("files", item) for item in FILES.items()])
    server.engine.aliases["poet"] = AliasInfo("poet", [AliasTarget("poet", 2)], "user", "tag", 3.0)
    folder = adapter_folder(tmp_path / "version")
    server.engine.files = AdapterFiles("poet", "d" * 64, str(folder), {"adapter_config.json": (0, "")})
    answer = await server.client.request(method, path.format(name="poet", model="poet"), **given)
    check(server.app.openapi(), method, path, answer)


async def test_loaded_adapters_are_listed_as_documented(server: StubCompletionApp, tmp_path: Path) -> None:
    sent = {"lora_name": "clerk", "lora_path": str(tmp_path / "roots" / "clerk")}
    for path, status in (("/load_lora_adapter", 200), ("/v1/load_lora_adapter", 409)):
        answer = await server.post(path, sent)
        assert answer.status_code == status
        check(server.app.openapi(), "post", path, answer)
