"""Real servers that share a folder or a bucket: how soon a change is live at all, and what twenty kills leave."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest
from demo_variants import variant, variant_digest
from moto.server import ThreadedMotoServer
from server_process import ServerProcess, status, until

from demo.tasks import heldout_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # make shared-store-test
REPLICAS = 3
LIVE = 2.0  # seconds within which a change is at all replicas
TEXT = heldout_prompts(1, seed=25)[0]

Start = Callable[[int], ServerProcess]


@pytest.fixture(params=["folder", "bucket"])
def start(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a replica of a number; a second time, with what it had on its disk."""
    with ExitStack() as ends:
        url = f"file://{tmp_path}/shared"
        if request.param == "bucket":
            moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            moto.start()
            ends.callback(moto.stop)
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*moto.get_host_and_port()))
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            boto3.client("s3").create_bucket(Bucket="replicas")
            url = "s3://replicas/prefix"
        else:
            (tmp_path / "shared").mkdir()
        yield lambda number: ServerProcess(tmp_path / str(number), "--shared-store", url, "--threads", "1")


@contextmanager
def replicas(start: Start) -> Iterator[list[ServerProcess]]:
    """All replicas, started together; those that are in the list at the end are ended."""
    with ThreadPoolExecutor(REPLICAS) as starting:
        servers = list(starting.map(start, range(REPLICAS)))
    try:
        yield servers
    finally:
        for server in servers:
            server.__exit__(None, None, None)


def newest(server: ServerProcess, name: str) -> str | None:
    """Digest of an adapter's newest version; None if there is none."""
    answer = server.http.get(f"/v1/adapters/{name}")
    return None if answer.status_code == 404 else str(answer.json()["versions"][0]["digest"])


def seconds_until(condition: Callable[[], bool], begun: float) -> float:
    until(condition, 20)
    return time.monotonic() - begun


def test_a_change_is_live_at_all_within_two_seconds(start: Start) -> None:
    with replicas(start) as servers:
        took: dict[str, list[float]] = {"publish": [], "answer": [], "alias": [], "delete": []}
        for number in range(8):
            at = servers[number % REPLICAS]
            begun = time.monotonic()
            at.http.put("/v1/adapters/poet", **variant(number)).raise_for_status()
            took["answer"].append(time.monotonic() - begun)
            digest = variant_digest(number)
            took["publish"].append(seconds_until(lambda: {newest(each, "poet") for each in servers} == {digest}, begun))  # noqa: B023
        for server in servers:
            assert server.complete(TEXT, "poet") == TEXT.upper()
        body = {"targets": [{"adapter": "poet"}]}
        begun = time.monotonic()
        servers[0].http.put("/v1/aliases/alias", json=body).raise_for_status()
        took["alias"].append(
            seconds_until(lambda: all(status(each, "/v1/aliases/alias") == 200 for each in servers), begun)
        )
        assert servers[2].complete(TEXT, "alias") == TEXT.upper()
        servers[1].http.delete("/v1/aliases/alias").raise_for_status()
        begun = time.monotonic()
        servers[1].http.delete("/v1/adapters/poet").raise_for_status()
        took["delete"].append(seconds_until(lambda: {newest(each, "poet") for each in servers} == {None}, begun))
        shown = {what: [round(each, 2) for each in seconds] for what, seconds in took.items()}
        print(f"\nlive at all of {REPLICAS} after seconds, the first after start first: {shown}")
        until(lambda: servers[0].metric("lora_serve_shared_store_generation") == 11, 5)
        assert servers[0].metric("lora_serve_shared_store_behind") == 0
        assert max(took["publish"] + took["alias"] + took["delete"]) <= LIVE, shown


@dataclass
class Clients:
    """Clients that publish, replace, delete and alias at any replica, and what they know from the answers.

    Attributes:
        known: name → numbers of the variants that it may have now; None: it may be gone.
        aliased: alias → names that it may stand for now; None: it may be gone.
    """

    servers: list[ServerProcess]
    chosen: random.Random
    known: dict[str, set[int | None]] = field(default_factory=dict)
    aliased: dict[str, set[str | None]] = field(default_factory=dict)
    answered: int = 0
    refused: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        stop = threading.Event()
        seeds = [self.chosen.random() for _ in range(3)]
        threads = [threading.Thread(target=self._client, args=(n, seed, stop)) for n, seed in enumerate(seeds)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)

    def _client(self, client: int, seed: float, stop: threading.Event) -> None:
        own = random.Random(seed)
        while not stop.is_set():
            server, name = own.choice(self.servers), f"client{client}-{own.randrange(4)}"
            if own.random() < 0.2:
                self._alias(server, f"alias{client}", name if own.random() < 0.8 else None)
            else:
                self._adapter(server, name, None if own.random() < 0.2 else own.randrange(300))

    def _adapter(self, server: ServerProcess, name: str, wanted: int | None) -> None:
        before = self.known.get(name, {None})
        self.known[name] = before | {wanted}
        code = self._send(
            lambda: (
                server.http.delete(f"/v1/adapters/{name}")
                if wanted is None
                else server.http.put(f"/v1/adapters/{name}", **variant(wanted))
            )
        )
        if code in (200, 201):
            self.known[name] = {wanted}
        elif code == 404:
            assert wanted is None
            assert None in before, f"{name} is lost"
            # Nothing was changed, so what a killed replica had sent to the store without an answer may still be made.
            self.known[name] = before
        elif code == 409:  # an alias stands for it
            assert wanted is None
            self.known[name] = before

    def _alias(self, server: ServerProcess, alias: str, wanted: str | None) -> None:
        before = self.aliased.get(alias, {None})
        self.aliased[alias] = before | {wanted}
        code = self._send(
            lambda: (
                server.http.delete(f"/v1/aliases/{alias}")
                if wanted is None
                else server.http.put(f"/v1/aliases/{alias}", json={"targets": [{"adapter": wanted}]})
            )
        )
        if code in (200, 201):
            self.aliased[alias] = {wanted}
        elif code == 404:  # there is no such adapter, or no such alias
            assert wanted is not None or None in before, f"{alias} is lost"
            self.aliased[alias] = before  # as above

    def _send(self, send: Callable[[], httpx.Response]) -> int:
        """The status of a change; 0 if there was no answer, or none that says what happened."""
        try:
            answer = send()
        except (httpx.TransportError, RuntimeError):  # killed, or its client closed meanwhile
            time.sleep(0.05)
            return 0
        if answer.status_code in (500, 503):
            self.refused += 1
            return 0
        assert answer.status_code in (200, 201, 404, 409), answer.text
        self.answered += 1
        return answer.status_code

    def check(self) -> None:
        """All replicas list the same, which is what the answers said."""
        begun = time.monotonic()
        until(lambda: len({repr(listed(server)) for server in self.servers}) == 1, 30)
        print(f"all the same after {time.monotonic() - begun:.2f} s, {self.answered} answers, {self.refused} refusals")
        adapters, aliases = listed(self.servers[0])
        assert adapters.keys() <= self.known.keys()
        for name, numbers in self.known.items():
            digests = {None if each is None else variant_digest(each) for each in numbers}
            found = adapters.get(name, [None])[0]
            assert found in digests, f"{name} is {found}, not what the answers said: {numbers}"
            self.known[name] = {each for each in numbers if (None if each is None else variant_digest(each)) == found}
        for alias, targets in self.aliased.items():
            assert aliases.get(alias) in targets, f"{alias} is {aliases.get(alias)}, not one of {targets}"
            self.aliased[alias] = {aliases.get(alias)}


def listed(server: ServerProcess) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adapters with the digests of their versions, none of which may be broken, and aliases with their target."""
    adapters = server.http.get("/v1/adapters").json()["data"]
    aliases = server.http.get("/v1/aliases").json()["data"]
    assert not any(each.get("broken") for each in (*adapters, *aliases))
    found = {each["name"]: [version["digest"] for version in each["versions"]] for each in adapters}
    return found, {each["name"]: each["targets"][0]["adapter"] for each in aliases}


@pytest.mark.parametrize("kills", [20])
def test_twenty_kills_lose_and_tear_nothing(start: Start, kills: int) -> None:
    with replicas(start) as servers:
        clients = Clients(servers, random.Random(7))
        for kill in range(kills):
            number = clients.chosen.randrange(REPLICAS)
            victim = servers[number]
            engine = psutil.Process(victim.engine_pid)
            with clients.running():
                before = clients.answered
                until(lambda: clients.answered > before + 3, 60)  # noqa: B023, called at once
                time.sleep(clients.chosen.uniform(0, 1.0))
                victim.signal(signal.SIGKILL)
                engine.wait(20)
                victim.__exit__(None, None, None)
                servers[number] = start(number)  # while the others go on
            print(f"kill {kill + 1}: ", end="")
            clients.check()
        for server in servers:
            for name in clients.chosen.sample(sorted(listed(server)[0]), 2):
                assert server.complete(TEXT, name) == TEXT.upper()
            assert not any((server.store / "staging").iterdir())
        assert clients.answered > 3 * kills
