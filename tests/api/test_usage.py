"""Usage by key, adapter and day: what is counted, what is kept, and who may see it."""

from __future__ import annotations

import logging
import sqlite3
from datetime import date, timedelta
from pathlib import Path

import pytest
from stub_admin import refusal
from stub_completions import StubCompletionApp

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.api.usage import DayUsage, UsageRecords
from lora_serve.errors import Overloaded, StoreUnusable

TODAY = date(2026, 3, 1)


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    callers = {"sk-a": Caller("a"), "sk-b": Caller("b"), "sk-all": Caller("all", metrics=True)}
    return StubCompletionApp(tmp_path, Keys({hash_key(key): caller for key, caller in callers.items()}))


async def entries(server: StubCompletionApp, key: str, query: str = "") -> list[tuple[str, str, int, int, int]]:
    answer = await server.client.get(f"/v1/usage{query}", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    names = ("key", "adapter", "requests", "prompt_tokens", "completion_tokens")
    return [tuple(entry[name] for name in names) for entry in answer.json()["data"]]


async def test_requests_and_tokens_are_counted_by_key_and_adapter(server: StubCompletionApp) -> None:
    await server.complete("sk-a", prompt="four", max_tokens=2)
    await server.complete("sk-a", prompt="four", max_tokens=3, n=2, stream=True)
    await server.complete("sk-a", prompt="four", max_tokens=2, adapter="poet")
    await server.post("/v1/embeddings", {"input": ["four", "five5"]}, "sk-b")
    assert await entries(server, "sk-all") == [("a", "", 2, 8, 8), ("a", "poet", 1, 4, 2), ("b", "", 1, 9, 0)]
    assert await entries(server, "sk-all", "?adapter=poet") == [("a", "poet", 1, 4, 2)]
    assert await entries(server, "sk-all", "?adapter=&key=b") == [("b", "", 1, 9, 0)]


async def test_a_refused_request_is_not_counted(server: StubCompletionApp) -> None:
    server.engine.refusals = {0: Overloaded("too many wait", retry_after=1)}
    await server.complete("sk-a")
    await server.complete("sk-a", adapter="nobody")
    assert await entries(server, "sk-all") == []


async def test_a_key_sees_its_own_usage_only(server: StubCompletionApp) -> None:
    for key in ("sk-a", "sk-b"):
        await server.complete(key, prompt="four", max_tokens=2)
    assert await entries(server, "sk-a") == [("a", "", 1, 4, 2)]
    assert await entries(server, "sk-a", "?key=a") == [("a", "", 1, 4, 2)]
    answer = await server.client.get("/v1/usage?key=b", headers={"Authorization": "Bearer sk-a"})
    assert refusal(answer)[:2] == (403, "key")


async def test_days_are_chosen_and_checked(server: StubCompletionApp) -> None:
    await server.complete("sk-a", prompt="four", max_tokens=2)
    assert len(await entries(server, "sk-a", "?first=2000-01-01")) == 1
    assert await entries(server, "sk-a", "?last=2000-01-01") == []
    for query in ("?first=2000-01-02&last=2000-01-01", "?first=today"):
        answer = await server.client.get(f"/v1/usage{query}", headers={"Authorization": "Bearer sk-a"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].endswith("first")


async def test_usage_survives_a_restart_and_days_are_apart(tmp_path: Path) -> None:
    file, today = tmp_path / "usage.sqlite", TODAY
    for day in range(2):
        records = UsageRecords(lambda: file, lambda day=day: today + timedelta(day))  # type: ignore[misc]
        for _ in range(3):
            records.add("a", "poet", 5, 7)
        records.close()
    records = UsageRecords(lambda: file)
    assert await records.read(TODAY, TODAY + timedelta(9)) == [
        DayUsage("2026-03-01", "a", "poet", 3, 15, 21),
        DayUsage("2026-03-02", "a", "poet", 3, 15, 21),
    ]
    assert await records.read(TODAY, TODAY) == [DayUsage("2026-03-01", "a", "poet", 3, 15, 21)]
    records.close()


async def test_what_cannot_be_written_is_kept_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "not-there"
    records = UsageRecords(lambda: folder / "usage.sqlite", lambda: TODAY)
    for _ in range(3):
        records.add("a", "", 1, 1)
        with pytest.raises(StoreUnusable):
            await records.read(TODAY, TODAY)
    assert len([each for each in caplog.records if each.levelno == logging.ERROR]) == 1
    folder.mkdir()
    assert await records.read(TODAY, TODAY) == [DayUsage("2026-03-01", "a", "", 3, 3, 3)]
    records.close()


async def test_another_process_may_read_the_file_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "usage.sqlite"
    records = UsageRecords(lambda: file, lambda: TODAY)
    records.add("a", "", 1, 1)
    await records.read(TODAY, TODAY)
    other = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    assert other.execute("select requests from usage").fetchall() == [(1,)]
    records.add("a", "", 1, 1)
    await records.read(TODAY, TODAY)
    assert other.execute("select requests from usage").fetchall() == [(2,)]
    other.close()
    records.close()


async def test_inputs_that_were_embedded_count_also_if_a_later_one_fails(server: StubCompletionApp) -> None:
    server.engine.refusals = {1: Overloaded("too many wait", retry_after=1)}
    assert (await server.post("/v1/embeddings", {"input": ["four", "five5"]}, "sk-a")).status_code == 429
    assert await entries(server, "sk-all") == [("a", "", 1, 4, 0)]


async def test_a_request_that_ends_after_the_last_write_is_counted_too(tmp_path: Path) -> None:
    records = UsageRecords(lambda: tmp_path / "usage.sqlite", lambda: TODAY)
    records.close()
    records.add("a", "", 1, 1)
    again = UsageRecords(lambda: tmp_path / "usage.sqlite")
    assert await again.read(TODAY, TODAY) == [DayUsage("2026-03-01", "a", "", 1, 1, 1)]
    again.close()


async def test_a_broken_usage_file_is_said(server: StubCompletionApp, tmp_path: Path) -> None:
    (tmp_path / "usage.sqlite").write_bytes(b"not a database" * 1000)
    answer = await server.client.get("/v1/usage", headers={"Authorization": "Bearer sk-a"})
    assert refusal(answer)[0] == 507
    assert "usage cannot be read" in refusal(answer)[2]


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_deleted_or_replaced_while_open_is_noticed_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, replaced: bool
) -> None:
    file = tmp_path / "usage.sqlite"
    backup = UsageRecords(lambda: tmp_path / "backup.sqlite", lambda: TODAY)
    backup.add("b", "", 1, 1)
    backup.close()
    records = UsageRecords(lambda: file, lambda: TODAY)
    records.add("a", "poet", 5, 7)
    await records.read(TODAY, TODAY)
    (tmp_path / "backup.sqlite").rename(file) if replaced else file.unlink()
    for _ in range(2):
        records.add("a", "poet", 1, 1)
    restored = [DayUsage("2026-03-01", "b", "", 1, 1, 1)] if replaced else []
    assert await records.read(TODAY, TODAY) == [DayUsage("2026-03-01", "a", "poet", 2, 2, 2), *restored]
    records.close()
    again = UsageRecords(lambda: file)
    assert await again.read(TODAY, TODAY) == [DayUsage("2026-03-01", "a", "poet", 2, 2, 2), *restored]
    again.close()
    (said,) = [each.getMessage() for each in caplog.records if "usage file" in each.getMessage()]
    assert "it had 1 requests, 5 prompt tokens and 7 completion tokens" in said


async def test_what_is_written_to_a_file_as_it_goes_away_is_written_to_the_next(tmp_path: Path) -> None:
    folder, moved = tmp_path / "store", tmp_path / "moved"
    folder.mkdir()
    asked = 0

    def path() -> Path:
        nonlocal asked
        asked += 1
        if asked == 3:  # the first time after what was added is written
            folder.rename(moved)
            folder.mkdir()
        return folder / "usage.sqlite"

    records = UsageRecords(path, lambda: TODAY)
    records.close()  # without its thread, `add` writes at once
    asked = 1
    records.add("a", "", 1, 1)
    records = UsageRecords(lambda: folder / "usage.sqlite")
    assert await records.read(TODAY, TODAY) == [DayUsage("2026-03-01", "a", "", 1, 1, 1)]
    records.close()
