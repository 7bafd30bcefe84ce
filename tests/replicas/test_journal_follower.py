"""A replica makes up the changes of the journal: it gets where those are that made all of them."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from lora_serve.replicas.change_journal import ChangeJournal
from lora_serve.replicas.changes import as_kept, change_kind
from lora_serve.replicas.compaction import ADAPTERS
from lora_serve.replicas.forwarding import ForwardedRequest, ResponseBegin, ServerLost, WholeResponse
from lora_serve.replicas.journal_follower import JournalFollower

KEEP_VERSIONS = 2


class Server:
    """What of a server's adapters and aliases depends on the order of changes; an upload's body is its digest."""

    def __init__(self) -> None:
        self.versions: dict[str, list[str]] = {}  # newest first
        self.aliases: dict[str, list[str]] = {}
        self.pinned: set[str] = set()
        self.asked: list[str] = []
        self.lost = False

    async def ask(self, request: ForwardedRequest) -> WholeResponse | ServerLost:
        if self.lost:
            return ServerLost("a", "closed")
        self.asked.append(f"{request.method} {request.target}")
        status, answer = self._change(request)
        self._forget()
        return WholeResponse(ResponseBegin("a", status, ()), json.dumps(answer).encode())

    def serves(self, target: str) -> bool:
        name, _, digest = target.partition("@")
        versions = self.versions.get(name, [])
        return digest in versions if digest else bool(versions)

    def _change(self, request: ForwardedRequest) -> tuple[int, object]:
        kind, name, *pin = request.target.removeprefix("/v1/").split("/")
        names: dict[str, list[str]] = self.versions if kind == "adapters" else self.aliases
        if request.method == "DELETE":
            self.pinned -= {name} if kind == "adapters" else set()
            return (404 if names.pop(name, None) is None else 200), {}
        if pin:
            (self.pinned.add if pin == ["pin"] else self.pinned.discard)(name)
            if name not in self.versions:
                self.pinned.discard(name)
            return (200 if name in self.versions else 404), {}
        if name in (self.aliases if kind == "adapters" else self.versions):
            return 409, {}
        if kind == "adapters":
            digest = request.body.decode()
            self.versions[name] = [digest, *(each for each in self.versions.get(name, []) if each != digest)]
            return 201, {"name": name, "versions": [{"digest": digest}]}
        targets = json.loads(request.body)
        if not all(self.serves(target) for target in targets):
            return 404, {}
        self.aliases[name] = targets
        return 200, {"targets": [{"adapter": target} for target in targets]}

    def _forget(self) -> None:
        named = {target for targets in self.aliases.values() for target in targets}
        for name, versions in self.versions.items():
            older = [digest for digest in versions[KEEP_VERSIONS:] if f"{name}@{digest}" in named]
            self.versions[name] = versions[:KEEP_VERSIONS] + older


class Application:
    """One replica that makes all changes, and the journal that is kept of them, as the ingress does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, Server()
        self._journal = ChangeJournal(folder, KEEP_VERSIONS)

    def send(self, method: str, target: str, body: bytes = b"") -> int:
        request = ForwardedRequest(method, target, (), body)
        kind = change_kind(method, target)
        assert kind is not None
        number = self._journal.begin(body)
        result = asyncio.run(self.server.ask(request))
        assert isinstance(result, WholeResponse)
        if result.begin.status < 400:
            self._journal.keep(number, *as_kept(kind, request, result))
        self._journal.abandon(number)
        return result.begin.status

    def publish(self, name: str, digest: str) -> int:
        return self.send("PUT", f"/v1/adapters/{name}", digest.encode())

    def alias(self, name: str, *targets: str) -> int:
        return self.send("PUT", f"/v1/aliases/{name}", json.dumps(targets).encode())

    def bodies(self) -> set[str]:
        """The uploads that are kept."""
        journal = ChangeJournal(self.folder)
        return {journal.body(change).decode() for change in journal.read() if change.thing.startswith(ADAPTERS)} - {""}


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Application:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # these tests survive no power failure
    return Application(tmp_path)


def new_replica(application: Application, server: Server | None = None) -> tuple[Server, JournalFollower]:
    server = server or Server()
    follower = JournalFollower("b", ChangeJournal(application.folder), server.ask)
    asyncio.run(follower.make_up())
    return server, follower


def test_an_alias_keeps_its_target_when_the_adapter_gets_newer_versions(application: Application) -> None:
    application.publish("support", "v1")
    application.alias("plain", "support")
    application.alias("stable", "support@v1")
    application.send("POST", "/v1/adapters/support/pin")
    for number in range(2, 7):
        assert application.publish("support", f"v{number}") == 201
    application.alias("stable", "support@v1", "support@v6")
    server, _ = new_replica(application)
    assert server.versions == application.server.versions == {"support": ["v6", "v5", "v1"]}
    assert server.aliases == {"plain": ["support"], "stable": ["support@v1", "support@v6"]}
    assert server.pinned == {"support"}


def test_uploads_that_no_replica_needs_are_not_kept(application: Application) -> None:
    for number in range(1, 6):
        application.publish("x", f"v{number}")
    assert application.bodies() == {"v4", "v5"}
    application.alias("a", "x@v4")
    for number in (6, 7, 7, 7):
        application.publish("x", f"v{number}")
    assert application.bodies() == {"v4", "v6", "v7"}
    application.send("DELETE", "/v1/aliases/a")
    assert application.bodies() == {"v6", "v7"}
    application.send("DELETE", "/v1/adapters/x")
    assert application.bodies() == set()


def test_what_needs_an_adapter_that_is_not_there_yet_is_tried_again(application: Application) -> None:
    application.server.versions["local"] = ["v1"]  # from the folder that replicas begin with
    assert application.alias("a", "local") == 200
    assert application.send("POST", "/v1/adapters/local/pin") == 200
    server, follower = new_replica(application)
    assert (server.aliases, server.pinned) == ({}, set())
    server.versions["local"] = ["v1"]
    asyncio.run(follower.make_up())
    assert (server.aliases, server.pinned) == ({"a": ["local"]}, {"local"})
    server.asked.clear()
    asyncio.run(follower.make_up())
    assert server.asked == []  # all are made


def test_a_change_that_did_not_reach_the_server_is_made_later_and_not_after_a_newer_one(
    application: Application,
) -> None:
    application.publish("x", "v1")
    server = Server()
    server.lost = True
    _, follower = new_replica(application, server)
    server.lost = False
    application.publish("x", "v2")
    follower.note("/v1/adapters/x", ChangeJournal(application.folder).read()[-1].number)
    asyncio.run(follower.make_up())
    assert server.asked == []
    application.publish("x", "v3")
    asyncio.run(follower.make_up())
    assert server.versions == {"x": ["v3"]}


@pytest.mark.parametrize("seed", range(4))
def test_a_new_replica_gets_where_the_others_are_whatever_was_changed(application: Application, seed: int) -> None:
    own = random.Random(seed)
    for _ in range(60):
        _change_something(application, own)
    there, (here, _) = application.server, new_replica(application)
    assert {name: versions[0] for name, versions in here.versions.items()} == {
        name: versions[0] for name, versions in there.versions.items()
    }
    assert here.aliases == there.aliases
    assert here.pinned == there.pinned
    for target in (target for targets in there.aliases.values() for target in targets):
        assert here.serves(target) or not there.serves(target)


def _change_something(application: Application, own: random.Random) -> None:
    name, alias, digest = own.choice("xy"), own.choice("ab"), f"v{own.randrange(6)}"
    targets = own.sample(["x", "y", *(f"{name}@v{number}" for name in "xy" for number in range(6))], own.choice([1, 2]))
    match own.randrange(6):
        case 0 | 1:
            application.publish(name, digest)
        case 2 | 3:
            application.alias(alias, *targets)
        case 4:
            application.send("DELETE", f"/v1/{own.choice([f'adapters/{name}', f'aliases/{alias}'])}")
        case 5:
            application.send("POST", f"/v1/adapters/{name}/{own.choice(['pin', 'unpin'])}")
