"""The engine, or the whole server, is killed while adapters are published: what was answered is there afterwards."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx
import psutil
import pytest
from demo_variants import variant, variant_digest
from server_process import ServerProcess, status, until

from demo.tasks import heldout_prompts

CLIENTS = 4
TEXT = heldout_prompts(1, seed=25)[0]


@dataclass
class Uploads:
    """Clients that publish, replace and delete, and what they know of the store from the answers.

    Attributes:
        known: name → numbers of the variants that it may have now; None: it may be gone.
    """

    chosen: random.Random
    known: dict[str, set[int | None]] = field(default_factory=dict)
    answered: int = 0

    @contextmanager
    def running(self, server: ServerProcess) -> Iterator[None]:
        """Clients at work; a client whose answer was lost gives up."""
        stop = threading.Event()
        seeds = [self.chosen.random() for _ in range(CLIENTS)]
        threads = [threading.Thread(target=self._client, args=(server, n, seeds[n], stop)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)

    def _client(self, server: ServerProcess, client: int, seed: float, stop: threading.Event) -> None:
        own = random.Random(seed)
        while not stop.is_set():
            name, number = f"client{client}-{own.randrange(5)}", own.randrange(500)
            before, wanted = self.known.get(name, {None}), None if own.random() < 0.2 else number
            self.known[name] = before | {wanted}
            try:
                if wanted is None:
                    answer = server.http.delete(f"/v1/adapters/{name}")
                else:
                    answer = server.http.put(f"/v1/adapters/{name}", **variant(number))
            except httpx.TransportError:
                return
            if answer.status_code in (200, 201):
                self.known[name] = {wanted}
                self.answered += 1
            elif answer.status_code == 404:
                assert wanted is None
                assert None in before
                self.known[name] = {None}
            else:
                assert answer.status_code in (500, 503), answer.text

    def check(self, server: ServerProcess) -> None:
        """What is listed is what the answers said, is whole, and answers."""
        listed = {each["name"]: each for each in server.http.get("/v1/adapters").json()["data"]}
        assert listed.keys() <= self.known.keys()
        for name, numbers in self.known.items():
            if name not in listed:
                assert None in numbers, f"{name} is lost"
                self.known[name] = {None}
                continue
            assert listed[name].get("broken") is None
            digest = listed[name]["versions"][0]["digest"]
            self.known[name] = {each for each in numbers if each is not None and variant_digest(each) == digest}
            assert self.known[name], f"{name} has another version than the answers said"
        for name in self.chosen.sample(sorted(listed), min(4, len(listed))):
            assert server.complete(TEXT, name) == TEXT.upper()


@pytest.mark.parametrize("victim", ["engine", "server"])
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(0)])])
def test_what_was_answered_is_there(tmp_path: Path, victim: Literal["engine", "server"], kills: int) -> None:
    uploads, store = Uploads(random.Random(victim)), tmp_path / "store"
    left = kills
    while left:
        with ServerProcess(store) as server:
            uploads.check(server)
            while left:
                left -= 1
                engine = psutil.Process(server.engine_pid)
                with uploads.running(server):
                    before = uploads.answered
                    until(lambda: uploads.answered > before, 60)  # noqa: B023, called at once
                    time.sleep(uploads.chosen.uniform(0, 1.5))
                    if victim == "server":
                        server.signal(signal.SIGKILL)
                        engine.wait(20)  # it ends by itself when it is alone
                        break
                    os.kill(engine.pid, signal.SIGKILL)
                until(lambda: status(server, "/ready") == 200, 60)
                uploads.check(server)
    with ServerProcess(store) as server:
        uploads.check(server)
        assert not any((store / "staging").iterdir())
        # What was stored and not named when the end came was kept there; it is no version that a name should have.
        aside = {path.name for path in (store / "set-aside").rglob("versions/*")}
        assert {path.relative_to(store).parts[1] for path in (store / "set-aside").rglob("*")} <= {"versions"}
        named = {variant_digest(each) for numbers in uploads.known.values() for each in numbers if each is not None}
        assert not aside & named
    assert uploads.answered >= kills
