"""Health, readiness, metrics, and limits on the size of bodies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import pytest
from stub_admin import StubAdminApp, refusal

from lora_serve.messages import StepReport, Update

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def server(tmp_path: Path) -> StubAdminApp:
    return StubAdminApp(tmp_path, max_body=1000)


@pytest.mark.parametrize(
    ("alive", "ready", "health", "readiness"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, False, 503, 503)],
)
async def test_health_reports_the_heartbeat_and_ready_whether_requests_are_accepted(
    server: StubAdminApp, alive: bool, ready: bool, health: int, readiness: int
) -> None:
    server.engine.alive, server.engine.ready = alive, ready
    assert (await server.ask("GET", "/health")).status_code == health
    answer = await server.ask("GET", "/ready")
    assert answer.status_code == readiness
    assert ("Retry-After" in answer.headers) == (readiness == 503)


async def test_the_version_is_that_of_the_package(server: StubAdminApp) -> None:
    assert (await server.ask("GET", "/version")).json() == {"version": version("lora-serve")}


async def test_metrics_show_the_engine_s_statistics(server: StubAdminApp) -> None:
    for observer in server.engine.observers:
        observer(Update([], step=StepReport(3, 30, 2, 0.1)))
    answer = await server.ask("GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "lora_serve_batch_sequences_sum 3.0" in answer.text


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_size_limit_is_refused_with_or_without_content_length(
    server: StubAdminApp, announced: bool
) -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 100
            yield b" " * 100

    content = b" " * 10_000 if announced else pieces()
    answer = await server.ask("POST", "/v1/unload_lora_adapter", content=content)
    status, _, message = refusal(answer)
    assert status == 413
    assert "1,000 bytes" in message
    assert sent <= 1100, "it must stop reading at the cap"


async def test_a_body_within_the_size_limit_arrives_complete(server: StubAdminApp) -> None:
    content = b'{"lora_name": "poet"}' + b" " * 970
    assert refusal(await server.ask("POST", "/v1/unload_lora_adapter", content=content, headers=JSON))[0] == 404


async def test_the_schema_lists_every_route(server: StubAdminApp) -> None:
    schema = (await server.ask("GET", "/openapi.json")).json()
    for path in ("/health", "/ready", "/metrics", "/v1/adapters", "/v1/adapters/{name}", "/v1/load_lora_adapter"):
        assert path in schema["paths"]
    upload = schema["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(upload["properties"]) == {"name", "files", "archive", "settings", "trust_settings"}
