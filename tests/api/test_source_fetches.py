"""Adapters of sources: fetched once for all that wait, remembered if they cannot be had, and named by admins only."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from stub_admin import CONFIG, FILES, StubAdminApp, StubAdminEngine, adapter_folder, engine_info, refusal, tar

from lora_serve.adapter_sources import AdapterLocation, parse_sources
from lora_serve.api import fetch_slots
from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.api.negative_cache import NegativeCache
from lora_serve.api.source_fetches import SourceFetches
from lora_serve.errors import AdapterInvalid, AdapterNotFound, Overloaded, ServeError, Unavailable
from lora_serve.messages import AliasTarget, DescribeAdapter, Publish, PutAlias
from lora_serve.names import adapter_not_found
from lora_serve.sources.fetch_messages import FetchDone
from lora_serve.sources.totals import SourceTotals


class FakeFetcher:
    """Writes an adapter's files, once it may.

    Attributes:
        asked: labels of what was asked for, in order.
        has: these labels are there; all others are not found.
        seconds: that each of these fetches may take, and `limits`: that are configured.
        failure: raised instead.
        slow_source: the one that waits until it may; empty for all.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.seconds: list[float] = []
        self.limits: list[float] = []
        self.slow_source = ""
        self.has: set[str] = set()
        self.failure: ServeError | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def fetch(self, location: AdapterLocation, folder: str, **given: Any) -> FetchDone:
        self.asked.append(location.label)
        self.seconds.append(given["seconds"])
        self.limits.append(given["limit"])
        given["on_progress"](100, 300)
        if self.slow_source in ("", location.source):
            await self.may_end.wait()
        if self.failure is not None:
            raise self.failure
        if location.label not in self.has:
            raise AdapterNotFound(f"source {location.source} does not have it", param="source")
        for name, content in FILES.items():
            (Path(folder) / name).write_bytes(content)
        return FetchDone(1, 300)


class Harness:
    """Two sources, a stub engine and a clock."""

    def __init__(self, store: Path) -> None:
        self.engine, self.fetcher, self.totals = StubAdminEngine(), FakeFetcher(), SourceTotals()
        self.engine.info = engine_info(store)
        self.now = 0.0
        self.staging = store / "staging"
        self.fetches = SourceFetches(
            parse_sources(["one=s3://bucket", "two=hf://acme"]),
            self.engine,
            self.fetcher,  # type: ignore[arg-type]
            lambda: self.staging,
            self.totals,
            most=1 << 20,
            seconds=5,
            failures=NegativeCache(most=3, clock=lambda: self.now),
        )

    @property
    def published(self) -> list[Publish]:
        return [operation for operation in self.engine.operations if isinstance(operation, Publish)]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def enter(context: AbstractAsyncContextManager[Any]) -> None:
    async with context:
        pass


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


async def test_all_that_wait_for_an_adapter_share_one_fetch(harness: Harness) -> None:
    harness.fetcher.has.add("two/poet")
    harness.fetcher.may_end.clear()
    waiting = [asyncio.create_task(harness.fetches.fetch_missing(["poet"], "key")) for _ in range(20)]
    await until(lambda: harness.totals.running and harness.totals.waiting == 20)
    assert [(each.source, each.received, each.expected) for each in harness.totals.running] == [("one", 100, 300)]
    harness.fetcher.may_end.set()
    assert await asyncio.gather(*waiting) == 20 * [True]
    assert harness.fetcher.asked == ["one/poet", "two/poet"]  # in the operator's order
    (publish,) = harness.published
    assert (publish.name, publish.source, publish.replace, publish.unless_known) == ("poet", "two/poet", False, True)
    assert harness.engine.published == [FILES]
    assert list(harness.staging.iterdir()) == []
    assert harness.totals.waiting == 0
    assert harness.totals.bytes == {"one": 100, "two": 300}
    assert harness.totals.fetches == {("one", "adapter_not_found"): 1, ("two", "fetched"): 1}


async def test_published_adapters_and_impossible_names_are_not_looked_for(harness: Harness) -> None:
    harness.fetcher.has.add("one/poet")
    assert await harness.fetches.fetch_missing(["poet"], "key")
    harness.fetcher.asked.clear()
    assert not await harness.fetches.fetch_missing(["poet", "../x", "a/b", "", ".x", "x" * 65], "key")
    assert harness.fetcher.asked == []


async def test_an_alias_is_not_looked_for(harness: Harness) -> None:
    await harness.engine.call(Publish("poet", "nowhere"))
    await harness.engine.call(PutAlias("canary", [AliasTarget("poet")]))
    assert not await harness.fetches.fetch_missing(["canary"], "key")
    assert harness.fetcher.asked == []


async def test_a_deleted_adapter_is_fetched_again(harness: Harness) -> None:
    harness.fetcher.has.add("one/poet")
    assert await harness.fetches.fetch_missing(["poet"], "key")
    del harness.engine.adapters["poet"]
    assert await harness.fetches.fetch_missing(["poet"], "key")
    assert harness.fetcher.asked == ["one/poet", "one/poet"]


async def test_a_missing_adapter_is_remembered_for_a_while(harness: Harness) -> None:
    for _ in range(3):
        assert not await harness.fetches.fetch_missing(["poet"], "key")
    assert harness.fetcher.asked == ["one/poet", "two/poet"]
    assert harness.totals.remembered == 2
    harness.now = 10.1
    harness.fetcher.has.add("one/poet")
    assert await harness.fetches.fetch_missing(["poet"], "key")


async def test_as_many_names_are_remembered_as_there_is_room_for(harness: Harness) -> None:
    for name in "abcd":
        assert not await harness.fetches.fetch_missing([name], "key")
    harness.fetcher.asked.clear()
    assert not await harness.fetches.fetch_missing(["b"], "key")
    assert harness.fetcher.asked == []
    assert not await harness.fetches.fetch_missing(["a"], "key")
    assert harness.fetcher.asked == ["one/a", "two/a"]


async def test_a_source_that_fails_is_not_asked_again_at_once_and_no_other_is_instead(harness: Harness) -> None:
    harness.fetcher.has.add("two/poet")
    harness.fetcher.failure = Unavailable("source one cannot be read: HTTP 500", param="source", retry_after=30)
    for left in (30, 20):
        with pytest.raises(Unavailable, match="HTTP 500") as error:
            await harness.fetches.fetch_missing(["poet"], "key")
        assert error.value.retry_after == left
        harness.now += 10
    assert harness.fetcher.asked == ["one/poet"]


async def test_an_adapter_that_is_refused_is_not_fetched_again_at_once(harness: Harness) -> None:
    harness.fetcher.has.add("one/poet")
    harness.engine.failure = None
    original = harness.engine._do

    def refuse(operation: Any) -> Any:
        if isinstance(operation, Publish):
            raise AdapterInvalid("r must be a positive integer")
        return original(operation)

    harness.engine._do = refuse  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match="r must be a positive integer"):
            await harness.fetches.fetch_missing(["poet"], "key")
    assert harness.fetcher.asked == ["one/poet"]
    assert list(harness.staging.iterdir()) == []


async def test_an_engine_that_restarts_meanwhile_is_not_remembered(harness: Harness) -> None:
    harness.fetcher.has.add("one/poet")
    original = harness.engine._do

    def restart(operation: Any) -> Any:
        if isinstance(operation, Publish) and len(harness.published) == 1:
            raise Unavailable("the engine ended")
        return original(operation)

    harness.engine._do = restart  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await harness.fetches.fetch_missing(["poet"], "key")
    assert await harness.fetches.fetch_missing(["poet"], "key")


async def test_a_fetch_goes_on_without_those_who_waited(harness: Harness) -> None:
    harness.fetcher.has.add("one/poet")
    harness.fetcher.may_end.clear()
    waiting = asyncio.create_task(harness.fetches.fetch_missing(["poet"], "key"))
    await until(lambda: harness.fetcher.asked)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert harness.totals.waiting == 0
    harness.fetcher.may_end.set()
    assert await harness.fetches.fetch_missing(["poet"], "other")
    assert harness.fetcher.asked == ["one/poet"]


async def test_a_server_that_stops_lets_nobody_wait(harness: Harness) -> None:
    harness.fetcher.may_end.clear()
    draining, closing = (asyncio.create_task(harness.fetches.fetch_missing([name], "key")) for name in "ab")
    await until(lambda: len(harness.fetcher.asked) == 2)
    harness.engine.ready = False
    with pytest.raises(Unavailable):
        await draining
    await harness.fetches.close()
    with pytest.raises(Unavailable):
        await closing
    assert list(harness.staging.iterdir()) == []


async def test_one_key_cannot_have_everything_fetched(harness: Harness) -> None:
    harness.fetcher.may_end.clear()
    greedy = [asyncio.create_task(harness.fetches.fetch_missing([f"n{number}"], "greedy")) for number in range(40)]
    other = asyncio.create_task(harness.fetches.fetch_missing(["mine"], "modest"))
    await until(lambda: len(harness.fetcher.asked) == 5)  # four of the one, and the other's beside them
    refused = [task for task in greedy if task.done()]
    assert len(refused) == 8
    assert all(isinstance(task.exception(), Overloaded) for task in refused)
    assert not other.done()
    assert "one/mine" in harness.fetcher.asked
    harness.fetcher.may_end.set()
    assert not await other


async def test_a_slow_source_keeps_nobody_from_another_and_tenants_keep_no_admin_from_it(harness: Harness) -> None:
    harness.fetcher.has.add("two/poet")
    harness.fetcher.slow_source = "one"
    harness.fetcher.may_end.clear()
    waiting = [
        asyncio.create_task(harness.fetches.fetch_missing([f"{key}{number}"], key))
        for key in "abc"
        for number in "1234"
    ]
    await until(lambda: len(harness.fetcher.asked) == 8)
    async with asyncio.timeout(5), harness.fetches.fetch_for_admin(harness.fetches.find("two", "poet"), "poet"):
        pass
    admin = asyncio.create_task(enter(harness.fetches.fetch_for_admin(harness.fetches.find("one", "x"), "x")))
    await until(lambda: harness.fetcher.asked[-1] == "one/x")
    harness.fetcher.may_end.set()
    assert await asyncio.gather(*waiting) == 12 * [False]
    with pytest.raises(AdapterNotFound):
        await admin


async def test_who_waits_too_long_for_a_turn_is_told_to_come_back_and_nothing_is_remembered(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_slots, "LONGEST_WAIT", 0.1)
    harness.fetcher.may_end.clear()
    first = [asyncio.create_task(harness.fetches.fetch_missing([f"n{number}"], "key")) for number in range(4)]
    await until(lambda: len(harness.fetcher.asked) == 4)
    with pytest.raises(Overloaded, match="source one") as error:
        await harness.fetches.fetch_missing(["poet"], "key")
    assert error.value.retry_after
    harness.fetcher.may_end.set()
    await asyncio.gather(*first)
    harness.fetcher.has.add("one/poet")
    assert await harness.fetches.fetch_missing(["poet"], "key")


async def test_the_wait_for_a_turn_is_no_part_of_the_time_for_the_sources(harness: Harness) -> None:
    harness.fetcher.may_end.clear()
    waiting = [asyncio.create_task(harness.fetches.fetch_missing([f"n{number}"], "key")) for number in range(5)]
    await until(lambda: len(harness.fetcher.asked) == 4)
    await asyncio.sleep(0.3)
    harness.fetcher.may_end.set()
    await asyncio.gather(*waiting)
    assert set(harness.fetcher.limits) == {5}  # the configured one, which messages name
    seconds = dict(zip(harness.fetcher.asked, harness.fetcher.seconds, strict=True))
    assert seconds["one/n4"] == 5
    assert seconds["two/n0"] <= 4.7  # what the first source took is


# --- routes ----------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[StubAdminApp]:
    adapter_folder(tmp_path / "source" / "poet")
    adapter_folder(tmp_path / "private" / "secret")
    (tmp_path / "source" / "packed.tar.gz").write_bytes(tar(FILES))
    keys = Keys(
        {
            hash_key("admin"): Caller("ops", admin=True),
            hash_key("team"): Caller("team", admin=True, adapters=("team-*",)),
            hash_key("user"): Caller("user"),
        }
    )
    app = StubAdminApp(tmp_path / "store", keys, adapter_source=[f"disk=file://{tmp_path}/source"])
    yield app
    await app.app.state.services.sources.close()


async def post(server: StubAdminApp, body: Any, key: str = "admin", path: str = "/v1/adapters") -> Any:
    method = "PUT" if path.startswith("/v1/adapters/p") else "POST"
    return await server.ask(method, path, key, json=body)


async def test_an_admin_publishes_from_a_source(server: StubAdminApp) -> None:
    answer = await post(server, {"name": "poet", "source": "disk"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["name"] == "poet"
    assert server.engine.published == [FILES]
    assert server.engine.sources == {"poet": "disk/poet"}
    assert refusal(await post(server, {"name": "poet", "source": "disk"}))[0] == 409
    answer = await post(server, {"source": "disk/packed.tar.gz", "digest": "0" * 64}, path="/v1/adapters/poet")
    assert answer.status_code == 201
    assert server.engine.published[2].keys() == {"archive"}  # the compiler opens it
    publish = server.engine.operations[-1]
    assert isinstance(publish, Publish)
    assert (publish.replace, publish.digest, publish.unless_known) == (True, "0" * 64, False)
    assert (await post(server, {"source": "disk/poet"}, path="/v1/adapters/inspect")).json()["digest"] == "digest"
    assert server.leftovers == []


async def test_settings_of_a_source_count_only_for_an_admin_who_says_so(server: StubAdminApp, tmp_path: Path) -> None:
    (tmp_path / "source" / "poet" / "serve.yaml").write_text("top_k: 1\n")
    for more, expected in (({}, False), ({"trust_settings": False}, False), ({"trust_settings": True}, True)):
        answer = await post(server, {"source": "disk/poet", **more}, path="/v1/adapters/poet")
        assert answer.status_code == 201, answer.text
        publish = server.engine.operations[-1]
        assert isinstance(publish, Publish)
        assert publish.trust_settings is expected
    (tmp_path / "source" / "poet" / "serve.yaml").write_text("temprature: 1\n")
    answer = await post(server, {"source": "disk/poet", "trust_settings": True}, path="/v1/adapters/poet")
    assert refusal(answer) == (422, "settings", "serve.yaml: there is no setting temprature; did you mean temperature?")


async def test_a_chat_template_is_none_of_an_admin_s_who_has_some_of_the_adapters(
    server: StubAdminApp, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    adapter_folder(source / "team-a")
    (source / "team-a.tar.gz").write_bytes(tar(FILES))
    for text, archived, expected in (
        ("top_k: 1", False, (201, 201)),
        ("chat_template: x", False, (403, 201)),
        ("top_k: 1", True, (403, 201)),  # nobody has looked into the archive yet
    ):
        (source / "team-a" / "serve.yaml").write_text(text)
        body = {"source": "disk/team-a.tar.gz" if archived else "disk/team-a", "trust_settings": True}
        for key, status in zip(("team", "admin"), expected, strict=True):
            server.engine.adapters.clear()
            answer = await post(server, {"name": "team-a"} | body, key)
            assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "x", "source": "nowhere"}, 400, "source"),
        ({"name": "x", "source": "http://169.254.169.254/latest"}, 400, "source"),
        ({"name": "x", "source": "disk/../private/secret"}, 400, "source"),
        ({"name": "x", "source": "disk/nobody"}, 404, "source"),
        ({"name": "x", "source": 7}, 400, "source"),
        ({"name": "x"}, 400, "source"),
        ({"source": "disk"}, 400, "name"),
        ({"source": "disk/poet"}, 400, "name"),
        ({"name": "x", "source": "disk", "digest": "xyz"}, 400, "digest"),
        ({"name": "x", "source": "disk", "url": "s3://b"}, 400, "url"),
        ({"name": "x", "source": "disk", "trust_settings": "true"}, 400, "trust_settings"),
        ({"name": "../x", "source": "disk"}, 400, "source"),
        ([], 400, None),
        ({"name": "x", "source": "y" * 9000}, 413, None),
    ],
)
async def test_a_body_that_names_nothing_of_a_source_is_refused(
    server: StubAdminApp, body: Any, status: int, param: str | None
) -> None:
    assert refusal(await post(server, body))[:2] == (status, param)
    assert server.engine.published == []
    assert server.leftovers == []


async def test_only_admins_name_sources_and_only_for_their_own_adapters(server: StubAdminApp) -> None:
    for key, name in (("user", "poet"), ("team", "poet")):
        for path in ("/v1/adapters", "/v1/adapters/poet"):
            body = {"name": name, "source": "disk/poet"}
            assert (await post(server, body, key, path)).status_code == 403
    assert server.engine.published == []
    for source in ("disk/poet", "disk/packed.tar.gz", "disk/nobody"):  # another tenant's, perhaps
        for path in ("/v1/adapters", "/v1/adapters/inspect"):
            answer = await post(server, {"name": "team-1", "source": source}, "team", path)
            assert refusal(answer) == (403, "source", "this key may not fetch that adapter")
    assert (await post(server, {"name": "team-1", "source": "disk"}, "team")).status_code == 404
    assert (await post(server, {"name": "team-1", "source": "disk/team-a/1"}, "team")).status_code == 404


async def test_a_name_that_cannot_be_published_is_refused_before_anything_is_fetched(server: StubAdminApp) -> None:
    fetcher = server.app.state.services.sources._fetcher = FakeFetcher()
    fetcher.has |= {"disk/team-a", "disk/poet"}
    for key, path, body, status in (
        ("team", "/v1/adapters", {"name": "theirs", "source": "disk/team-a"}, 403),
        ("admin", "/v1/adapters", {"name": "a b", "source": "disk/poet"}, 400),
        ("admin", "/v1/adapters", {"source": "disk/poet"}, 400),
        ("admin", "/v1/adapters/poet", {"name": "other", "source": "disk/poet"}, 400),
        ("admin", "/v1/adapters/inspect", {"name": "poet", "source": "disk/poet"}, 400),
    ):
        assert refusal(await post(server, body, key, path))[:2] == (status, "name")
    assert fetcher.asked == []
    assert (await post(server, {"name": "team-b", "source": "disk/team-a"}, "team")).status_code == 201


async def test_where_was_looked_is_said_for_forbidden_names_as_for_missing_ones(server: StubAdminApp) -> None:
    answers = []
    for key, name in (("admin", "nobody"), ("team", "poet")):
        answer = await server.ask("POST", "/tokenize", key, json={"prompt": "x", "adapter": name})
        answers.append((answer.status_code, answer.json()["error"]["message"].replace(name, "NAME")))
    assert set(answers) == {(404, "adapter NAME does not exist; looked in source disk")}
    assert not any(isinstance(each, DescribeAdapter) and each.name == "poet" for each in server.engine.operations)


async def test_an_admin_who_waits_while_the_server_stops_is_told_so(server: StubAdminApp) -> None:
    fetcher = FakeFetcher()
    fetcher.may_end.clear()
    server.app.state.services.sources._fetcher = fetcher
    waiting = asyncio.create_task(post(server, {"name": "poet", "source": "disk"}))
    await until(lambda: fetcher.asked)
    server.engine.ready = False
    answer = await waiting
    assert refusal(answer)[0] == 503
    assert answer.headers["Retry-After"] == "5"
    assert server.leftovers == []
    server.engine.ready = True
    fetcher.has.add("disk/poet")
    fetcher.may_end.set()
    assert (await post(server, {"name": "poet", "source": "disk"})).status_code == 201


async def test_the_targets_of_an_alias_are_fetched(server: StubAdminApp) -> None:
    do = server.engine._do

    def refuse(operation: Any) -> Any:
        """As the engine does for a target that is not published."""
        for number, target in enumerate(operation.targets if isinstance(operation, PutAlias) else ()):
            if target.adapter not in server.engine.adapters:
                error = adapter_not_found(target.adapter)
                raise AdapterNotFound(error.message, param=f"targets.{number}.adapter")
        return do(operation)

    server.engine._do = refuse  # type: ignore[method-assign]
    answer = await server.ask("PUT", "/v1/aliases/prod", "admin", json={"targets": [{"adapter": "poet"}]})
    assert answer.status_code == 200, answer.text
    assert server.engine.sources == {"poet": "disk/poet"}
    body = {"targets": [{"adapter": "poet"}, {"adapter": "nobody"}]}
    missing = await server.ask("PUT", "/v1/aliases/prod", "admin", json=body)
    text = "adapter nobody does not exist; looked in source disk"
    assert refusal(missing) == (404, "targets.1.adapter", text)
    hidden = {"targets": [{"adapter": "nobody"}]}
    answer = await server.ask("PUT", "/v1/aliases/team-prod", "team", json=hidden)
    assert refusal(answer) == (404, "targets.0.adapter", text)  # the same for what a key may not use


async def test_a_fetch_is_counted_and_written_to_the_audit_log(
    server: StubAdminApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await server.ask("POST", "/tokenize", "user", json={"prompt": "x", "adapter": "poet"})
    assert server.engine.published == [FILES]
    (audit,) = [record for record in caplog.records if record.name == "lora_serve.audit"]
    assert audit.getMessage() == "publish poet"
    assert audit.fields == {"digest": "digest0", "key": "user", "source": "disk/poet"}  # type: ignore[attr-defined]
    metrics = (await server.ask("GET", "/metrics", "admin")).text
    size = sum(map(len, FILES.values()))
    assert 'lora_serve_source_fetches_total{outcome="fetched",source="disk"} 1.0' in metrics
    assert f'lora_serve_source_bytes_total{{source="disk"}} {float(size)}' in metrics
    assert "lora_serve_source_waiting 0.0" in metrics


async def test_the_schema_knows_both_kinds_of_body(server: StubAdminApp) -> None:
    schema = (await server.ask("GET", "/openapi.json", "admin")).json()
    content = schema["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"]["required"] == ["source"]
    assert json.loads(CONFIG)
