"""What HTTP asks of every route: methods, encodings and media types of bodies, request ids."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from stub_admin import FILES, StubAdminApp, refusal
from stub_completions import StubCompletionApp, events

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.config import ServeConfig

JSON = {"Content-Type": "application/json"}
GZIP = {"Content-Encoding": "gzip"}
BODY = {"prompt": "hi", "max_tokens": 2}
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    return StubCompletionApp(tmp_path / "store", max_body=1000)


async def complete(server: StubCompletionApp, content: Any, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await server.client.post("/v1/completions", content=content, headers=named)


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", "/v1/adapters", {"GET", "HEAD", "POST"}),
        ("POST", "/v1/adapters/poet", {"GET", "HEAD", "PUT", "DELETE"}),
        ("GET", "/v1/completions", {"POST"}),
        ("HEAD", "/v1/completions", {"POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("OPTIONS", "/v1/models", {"GET", "HEAD"}),
    ],
)
async def test_405_lists_all_methods_of_the_path(
    server: StubCompletionApp, method: str, path: str, allowed: set[str]
) -> None:
    answer = await server.client.request(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == allowed


async def test_head_is_get_without_the_body(server: StubCompletionApp) -> None:
    found = [path for path, methods in server.app.openapi()["paths"].items() if "get" in methods]
    assert len(found) > 5
    for path in (*found, "/openapi.json", "/docs"):
        got, head = await server.client.get(path), await server.client.head(path)
        assert head.status_code == got.status_code
        assert head.content == b""
        assert head.headers["Content-Type"] == got.headers["Content-Type"]


# --- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
async def test_a_gzip_body_is_decompressed(server: StubCompletionApp, encoding: str) -> None:
    compressed = gzip.compress(json.dumps(BODY).encode())
    answer = await complete(server, compressed, **JSON, Content_Encoding=encoding)
    assert answer.json()["choices"][0]["text"] == "he"


async def test_a_gzip_body_may_come_in_pieces_and_members(server: StubCompletionApp) -> None:
    text = json.dumps(BODY).encode()
    compressed = gzip.compress(text[:10]) + gzip.compress(text[10:])

    async def pieces() -> AsyncIterator[bytes]:
        for byte in compressed:
            yield bytes([byte])

    assert (await complete(server, pieces(), **JSON, **GZIP)).status_code == 200


async def test_a_gzip_body_can_be_streamed_an_answer(server: StubCompletionApp) -> None:
    compressed = gzip.compress(json.dumps(BODY | {"stream": True}).encode())
    assert len(events(await complete(server, compressed, **JSON, **GZIP))) == 3


@pytest.mark.parametrize("size", [1001, 100_000_000])
async def test_the_size_limit_is_that_of_the_decompressed_body(server: StubCompletionApp, size: int) -> None:
    compressed = gzip.compress(b" " * size)
    assert size > 10_000 or len(compressed) < 1000
    assert refusal(await complete(server, compressed, **JSON, **GZIP))[0] == 413


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"",
        gzip.compress(b"{}", mtime=0)[:-1],
        gzip.compress(b"{}", mtime=0)[:-8] + bytes(8),
        gzip.compress(b"{}", mtime=0) + b"x",
    ],
)
async def test_a_body_that_is_not_gzip_is_400(server: StubCompletionApp, content: bytes) -> None:
    status, _, message = refusal(await complete(server, content, **JSON, **GZIP))
    assert status == 400
    assert "gzip" in message


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "zstd"])
async def test_other_encodings_are_415(server: StubCompletionApp, encoding: str) -> None:
    answer = await complete(server, b"{}", **JSON, Content_Encoding=encoding)
    assert refusal(answer)[0] == 415
    assert answer.headers["Accept-Encoding"] == "gzip"


async def test_an_upload_may_be_compressed_within_its_own_limit(tmp_path: Path) -> None:
    def upload(size: int) -> dict[str, Any]:
        files = FILES | {"adapter_model.safetensors": bytes(size)}
        request = httpx.Request("POST", "http://x", files=[("files", item) for item in files.items()])
        headers = {"Content-Type": request.headers["Content-Type"], **GZIP}
        return {"content": gzip.compress(request.read()), "headers": headers}

    server = StubAdminApp(tmp_path, max_adapter_size=1 << 20, max_body=1000)
    assert (await server.ask("PUT", "/v1/adapters/poet", **upload(1 << 19))).status_code == 201
    assert refusal(await server.ask("PUT", "/v1/adapters/poet", **upload(1 << 24)))[0] == 413
    assert len(server.engine.published[0]["adapter_model.safetensors"]) == 1 << 19
    assert server.leftovers == []


# --- media types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "application/json; charset=utf-8", "application/vnd.api+json"]
)
async def test_json_may_be_declared_or_not(server: StubCompletionApp, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert (await complete(server, json.dumps(BODY).encode(), **headers)).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/xml", "json"])
async def test_another_media_type_is_415(server: StubCompletionApp, content_type: str) -> None:
    assert refusal(await complete(server, json.dumps(BODY).encode(), Content_Type=content_type))[0] == 415


async def test_a_route_without_a_body_takes_any_media_type(tmp_path: Path) -> None:
    server = StubAdminApp(tmp_path)
    await server.upload()
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d '' sends
    assert (await server.ask("POST", "/v1/adapters/poet/load", headers=headers)).status_code == 200


# --- request ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "req_1-2/3~", "x" * 128])
async def test_the_caller_s_request_id_is_returned(server: StubCompletionApp, given: str) -> None:
    for path in ("/health", "/v1/no-such-route", "/openapi.json"):
        assert (await server.client.get(path, headers={"X-Request-Id": given})).headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b"\xc3\xa9", b"a\tb"])
async def test_another_request_id_is_replaced(server: StubCompletionApp, given: bytes) -> None:
    made = {
        (await server.client.get("/health", headers=[(b"X-Request-Id", given)])).headers["X-Request-Id"]
        for _ in range(2)
    }
    assert len(made) == 2
    assert all(len(id_) == 32 and id_.isalnum() for id_ in made)


async def test_errors_and_streams_have_a_request_id(server: StubCompletionApp) -> None:
    sent = json.dumps(BODY | {"stream": True}).encode()
    answers = {
        200: await complete(server, sent, X_Request_Id="a"),
        400: await complete(server, b"{", X_Request_Id="a"),
        403: await server.client.get("/health", headers={"Origin": "null", "X-Request-Id": "a"}),
        413: await complete(server, b" " * 2000, X_Request_Id="a"),
        415: await complete(server, b"{}", X_Request_Id="a", Content_Encoding="br"),
    }
    for status, answer in answers.items():
        assert (answer.status_code, answer.headers.get_list("X-Request-Id")) == (status, ["a"])


async def test_the_trace_of_a_request_is_returned_if_it_is_valid(server: StubCompletionApp) -> None:
    for given, returned in ((TRACE, TRACE), (TRACE[:-1], None), ("x", None), (TRACE.upper(), None)):
        answer = await server.client.get("/health", headers={"traceparent": given})
        assert answer.headers.get("traceparent") == returned


async def test_anthropic_s_errors_have_the_id_where_its_sdk_looks_for_it(server: StubCompletionApp) -> None:
    answer = await server.client.post("/v1/messages", json={}, headers={"X-Request-Id": "a"})
    assert answer.status_code == 400
    assert answer.json()["request_id"] == answer.headers["request-id"] == "a"
    server.engine.breaks = 1
    sent = {"model": "base", "max_tokens": 4, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    answer = await server.client.post("/v1/messages", json=sent, headers={"X-Request-Id": "b"})
    assert '"request_id":"b"' in answer.text


async def test_an_unexpected_error_is_logged_with_the_id_and_told_without_detail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = StubAdminApp(tmp_path, allow_origin=["https://page.example"])
    server.engine.failure = ZeroDivisionError("secret")
    headers = {"X-Request-Id": "abc", "traceparent": TRACE, "Origin": "https://page.example"}
    answer = await server.ask("GET", "/v1/adapters", headers=headers)
    assert refusal(answer) == (500, None, "the server failed on this request")
    assert answer.headers["X-Request-Id"] == "abc"
    assert answer.headers["Access-Control-Allow-Origin"] == "https://page.example"
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == f"GET '/v1/adapters' failed: request_id abc, traceparent {TRACE}"
    assert record.exc_info is not None


# --- web pages -------------------------------------------------------------------------------------------------------

OURS = ["http://localhost", "http://localhost:3000", "https://127.0.0.1:8000", "http://[::1]:8000", "http://127.9.9.9"]
FOREIGN = [
    "null", "", "https://evil.example", "http://localhost.evil.example", "http://localhost@evil.example", "localhost",
    "file://", "chrome-extension://localhost", "http://10.0.0.1", "http://[::1", "http://0.0.0.0", "http://127.0.0.1.nip.io",
]  # fmt: skip


@pytest.fixture
def admin(tmp_path: Path) -> StubAdminApp:
    return StubAdminApp(tmp_path, allow_origin=["https://chat.example"])


@pytest.mark.parametrize("origin", [*OURS, "https://chat.example"])
async def test_local_and_listed_origins_are_served(admin: StubAdminApp, origin: str) -> None:
    assert (await admin.ask("GET", "/v1/adapters", headers={"Origin": origin})).status_code == 200


@pytest.mark.parametrize("origin", [*FOREIGN, "https://chat.example.evil.example", "http://chat.example"])
async def test_other_origins_are_403_on_a_local_server_without_keys(admin: StubAdminApp, origin: str) -> None:
    sent = {"lora_name": "poet"}
    answer = await admin.ask("POST", "/v1/unload_lora_adapter", json=sent, headers={"Origin": origin})
    assert refusal(answer)[0] == 403
    assert admin.engine.operations == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "127.0.0.2"])
async def test_local_hosts_are_served(admin: StubAdminApp, host: str) -> None:
    assert (await admin.ask("GET", "/v1/adapters", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "a@b", "[::1", "10.0.0.1"]
)
async def test_a_rebound_host_name_is_403(admin: StubAdminApp, host: str) -> None:
    assert refusal(await admin.ask("GET", "/v1/adapters", headers={"Host": host}))[0] == 403


async def test_the_configured_host_is_served(tmp_path: Path) -> None:
    server = StubAdminApp(tmp_path, host="127.0.0.3")
    assert (await server.ask("GET", "/health", headers={"Host": "127.0.0.3:80"})).status_code == 200


async def test_with_keys_neither_host_nor_origin_is_checked(tmp_path: Path) -> None:
    server = StubAdminApp(tmp_path, Keys({hash_key("sk"): Caller("user")}))
    headers = {"Host": "models.example", "Origin": "https://evil.example"}
    answer = await server.ask("GET", "/v1/adapters", key="sk", headers=headers)
    assert answer.status_code == 200
    assert "Access-Control-Allow-Origin" not in answer.headers


async def test_a_preflight_needs_no_key(tmp_path: Path) -> None:
    server = StubAdminApp(tmp_path, Keys({hash_key("sk"): Caller("user")}), allow_origin=["https://chat.example"])
    headers = {
        "Origin": "https://chat.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    answer = await server.ask("OPTIONS", "/v1/completions", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    assert "x-stainless-os" in answer.headers["Access-Control-Allow-Headers"]
    refused = await server.ask("OPTIONS", "/v1/completions", headers=headers | {"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in refused.headers
    unauthorized = await server.ask("GET", "/v1/adapters", headers={"Origin": "https://chat.example"})
    assert unauthorized.status_code == 401
    assert unauthorized.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    assert "X-Request-Id" in unauthorized.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("origin", ["*", "chat.example", "https://chat.example/", "null", "https://*.example", ""])
def test_an_origin_that_cannot_be_allowed_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ValidationError, match="api-key-file" if origin == "*" else "not an origin"):
        ServeConfig(model="base", allow_origin=[origin])


def test_with_keys_every_origin_may_be_allowed(tmp_path: Path) -> None:
    assert ServeConfig(model="base", api_key_file=tmp_path, allow_origin=["*"]).allow_origin == ["*"]
