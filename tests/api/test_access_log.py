"""The access log's line for every request, and the audit log's for every change."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from stub_admin import StubAdminApp
from stub_completions import StubCompletionApp

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.api.request_record import RequestRecord
from lora_serve.errors import Overloaded

Lines = list[tuple[str, dict[str, Any]]]


def lines(caplog: pytest.LogCaptureFixture, log: str = "access") -> Lines:
    """Message and fields of the lines of a log."""
    found = [record for record in caplog.records if record.name == f"lora_serve.{log}"]
    return [(record.getMessage(), record.fields) for record in found]  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    return StubCompletionApp(tmp_path, Keys({hash_key("sk-secret"): Caller("team-a")}))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_has_one_line_with_key_adapter_tokens_and_times(
    server: StubCompletionApp, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    await server.complete("sk-secret", prompt="confidential", adapter="poet", max_tokens=2, n=2, stream=stream)
    ((message, fields),) = lines(caplog)
    assert message == "POST /v1/completions 200"
    times = {name: fields.pop(name) for name in ("queued", "first_token", "seconds")}
    assert 0 <= times["first_token"] <= times["seconds"]
    assert len(fields.pop("id")) == 32
    assert fields == {
        "key": "team-a",
        "adapter": "poet@dddddddddddd",
        "prompt_tokens": 12,
        "completion_tokens": 4,
        "finish": "length",
    }
    assert "confidential" not in caplog.text
    assert "sk-secret" not in caplog.text


async def test_a_refused_request_has_the_error_and_its_reason(
    server: StubCompletionApp, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.refusals = {0: Overloaded("too many wait", retry_after=1)}
    await server.complete("sk-secret")
    await server.complete("sk-secret", adapter="nobody")
    await server.complete("sk-secret", temperature="hot")
    await server.complete("sk-wrong")
    assert [(message, fields["error"], fields.get("key")) for message, fields in lines(caplog)] == [
        ("POST /v1/completions 429", "overloaded", "team-a"),
        ("POST /v1/completions 404", "adapter_not_found", "team-a"),
        ("POST /v1/completions 400", "bad_request", "team-a"),
        ("POST /v1/completions 401", "invalid_api_key", None),
    ]
    assert lines(caplog)[0][1]["reason"] == "too many wait"
    assert "sk-wrong" not in caplog.text


async def test_an_error_in_the_middle_of_a_stream_is_in_its_line(
    server: StubCompletionApp, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.breaks = 1
    await server.complete("sk-secret", stream=True)
    ((message, fields),) = lines(caplog)
    assert message == "POST /v1/completions 200"
    assert (fields["error"], fields["reason"], fields["finish"]) == ("engine_fault", "it broke", "engine_fault")


async def test_errors_are_counted_by_status_and_kind(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path)
    await server.complete(adapter="nobody")
    await server.complete(temperature="hot")
    metrics = (await server.client.get("/metrics")).text
    assert 'lora_serve_http_errors_total{error="adapter_not_found",status="404"} 1.0' in metrics
    assert 'lora_serve_http_errors_total{error="bad_request",status="400"} 1.0' in metrics


async def test_probes_and_scrapes_are_logged_only_if_they_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = StubAdminApp(tmp_path)
    for path in ("/health", "/ready", "/metrics"):
        await server.ask("GET", path)
    assert lines(caplog) == []
    server.engine.ready = False
    await server.ask("GET", "/ready")
    assert [message for message, _ in lines(caplog)] == ["GET /ready 503"]


async def test_a_path_cannot_forge_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await StubAdminApp(tmp_path).ask("GET", "/a%0AGET /b 200")
    ((message, _),) = lines(caplog)
    assert message == "GET '/a\\nGET /b 200' 404"


async def test_every_change_has_an_audit_line_with_who_what_and_which_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = StubAdminApp(tmp_path, Keys({hash_key("sk-admin"): Caller("ops", admin=True)}))
    server.client.headers["Authorization"] = "Bearer sk-admin"
    await server.upload()
    await server.upload(path="/v1/adapters/poet")
    for action in ("load", "pin", "unpin", "evict"):
        await server.ask("POST", f"/v1/adapters/poet/{action}")
    await server.ask("DELETE", "/v1/adapters/poet")
    await server.ask("DELETE", "/v1/adapters/poet")
    found = lines(caplog, "audit")
    assert [(message, fields["status"], fields.get("digest")) for message, fields in found] == [
        ("publish poet", 201, "digest0"),
        ("publish poet", 201, "digest1"),
        *((f"{action} poet", 200, "digest1") for action in ("load", "pin", "unpin", "evict")),
        ("delete poet", 200, None),
        ("delete poet", 404, None),
    ]
    assert {(fields["key"], fields["client"], len(fields["id"])) for _, fields in found} == {("ops", "127.0.0.1", 32)}


async def test_loading_from_a_folder_is_a_change_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = StubAdminApp(tmp_path, adapter_roots=[tmp_path])
    await server.ask("POST", "/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": str(tmp_path / "x")})
    await server.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "poet"})
    assert [message for message, _ in lines(caplog, "audit")] == ["publish poet", "unload poet"]


@pytest.mark.parametrize("route", ["/v1/unload_lora_adapter", "/unload_lora_adapter"])
async def test_a_name_cannot_forge_an_audit_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, route: str) -> None:
    await StubAdminApp(tmp_path).ask("POST", route, json={"lora_name": "x\npublish evil" + "y" * 1000})
    ((message, _),) = lines(caplog, "audit")
    assert message.startswith("unload 'x\\npublish evil")
    assert len(message) < 250


async def test_an_error_that_an_api_sends_as_its_own_event_is_in_the_line(
    server: StubCompletionApp, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.breaks = 1
    await server.post("/v1/responses", {"input": "hi", "stream": True}, "sk-secret")
    ((_, fields),) = lines(caplog)
    assert (fields["error"], fields["reason"]) == ("engine_fault", "it broke")


SECRET = "s3cret-text-of-a-client"


async def test_the_reason_of_a_refusal_is_a_class_and_has_no_text_of_the_client(
    server: StubCompletionApp, caplog: pytest.LogCaptureFixture
) -> None:
    deep = {
        "type": "json_schema",
        "json_schema": {"name": "x", "strict": True, "schema": {"type": "object", SECRET: 1}},
    }
    for body, reason in (
        ({SECRET: 1}, "extra_forbidden"),
        ({"stream_options": {SECRET: 1}}, "stream_options: extra_forbidden"),
        ({"temperature": SECRET}, "temperature: float_type"),
        ({"temperature": 99}, "temperature: less_than_equal"),
        ({"prompt": None}, "prompt: string_type"),
        ({"logit_bias": {SECRET: 1}}, "logit_bias: string_pattern_mismatch"),
        ({"response_format": deep}, "response_format"),
        ({"adapter": SECRET}, "adapter"),
        ({"model": SECRET}, "model"),
        ({"prompt": "x" * 10_000, "max_tokens": 1}, "This model's maximum context length"),
    ):
        caplog.clear()
        await server.complete("sk-secret", **{"model": None, **body})
        ((_, fields),) = lines(caplog)
        assert fields["reason"].startswith(reason), body
        assert SECRET not in caplog.text, body
        assert SECRET not in str(fields), body
    await server.post("/v1/completions", {}, "sk-secret")
    assert lines(caplog)[-1][1]["reason"] == "prompt: missing"


async def test_the_ends_of_choices_are_all_named_once_in_order_of_choice() -> None:
    record = RequestRecord()
    assert record.finish is None
    for choice, outcome in ((2, "length"), (0, "length"), (1, "stop")):
        record.finished(choice, outcome)
    assert record.finish == "length,stop"
