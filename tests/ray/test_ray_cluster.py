"""A Ray cluster on this machine with three replicas of the demo model: real processes, some of which are killed.

Run by `make ray-test`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server_process import ADAPTERS, DEMO, ROOT, until

from demo.tasks import heldout_prompts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

REPLICAS = 3
NAMES = ["count", "digits", "initials", "json", "reverse", "shout"]
TEXTS = heldout_prompts(20, seed=7)
PORT = 8173
SERVER = "lora_serve.replicas.server_main"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine alone, and Ray Serve on it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    variables = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    serve.start(http_options={"port": PORT})
    yield
    serve.shutdown()
    ray.shutdown()


@dataclass
class Endpoint:
    """The application's endpoint, and the processes behind it."""

    http: httpx.Client
    handle: Any

    def complete(self, text: str, adapter: str, **body: object) -> httpx.Response:
        given = {"prompt": f"{text}\n", "max_tokens": 48, "temperature": 0, "adapter": adapter, **body}
        return self.http.post("/v1/completions", json=given)

    def stream(self, text: str, adapter: str, **body: object) -> list[str]:
        """The data of a stream's events; its end is checked."""
        given = {"prompt": f"{text}\n", "max_tokens": 48, "temperature": 0, "adapter": adapter, "stream": True, **body}
        with self.http.stream("POST", "/v1/completions", json=given) as response:
            assert response.status_code == 200, response.read()
            events = [line[6:] for line in response.iter_lines() if line]
        assert events[-1] == "[DONE]"
        return events[:-1]

    def servers(self) -> list[psutil.Process]:
        """The servers of the replicas, which are children of their actors."""
        return [process for process in psutil.Process().children(recursive=True) if SERVER in _command(process)]

    def statistics(self) -> list[dict[str, Any]]:
        """What each replica tells the router."""
        found: list[dict[str, Any]] = self.handle.broadcast("record_routing_stats").results(timeout_s=30)
        return found

    def running(self) -> dict[str, float]:
        """Sequences that each replica runs, by replica."""
        found: dict[str, float] = {}
        for _ in range(50):
            answer = self.http.get("/metrics")
            line = next(line for line in answer.text.splitlines() if line.startswith("vllm:num_requests_running"))
            found[answer.headers["x-lora-serve-replica"]] = float(line.rsplit(" ", 1)[1])
        return found

    def wait_for_replicas(self, seconds: float = 150) -> None:
        def all_there() -> bool:
            try:
                return sum(bool(each.get("ready")) for each in self.statistics()) == REPLICAS
            except Exception:  # one that is being replaced
                return False

        until(lambda: all_there() and len(self.servers()) == REPLICAS, seconds)


@pytest.fixture(scope="module")
def endpoint(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from lora_serve.ray import app

    options = {
        "model": str(DEMO),
        "served_model_name": "demo",
        "adapters": str(ADAPTERS),
        "replicas": REPLICAS,
        "cpus": 1,
        "spill_at": 6,
        "journal": str(tmp_path_factory.mktemp("journal")),
        "max_num_seqs": 4,
    }
    serve.run(app(options), route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=180, limits=httpx.Limits()) as http:
        found = Endpoint(http, serve.get_deployment_handle("EngineReplica", app_name="default"))
        found.wait_for_replicas()
        yield found
    serve.delete("default")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_requests_find_their_adapter_loaded(endpoint: Endpoint) -> None:
    own = random.Random(1)
    wanted = [own.choice(NAMES) for _ in range(240)]
    held: dict[str, set[str]] = defaultdict(set)  # by adapter: replicas that it was sent to
    found = []
    with ThreadPoolExecutor(4) as clients:
        for adapter, answer in zip(
            wanted, clients.map(lambda name: endpoint.complete(own.choice(TEXTS), name), wanted), strict=True
        ):
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == adapter
            replica = answer.headers["x-lora-serve-replica"]
            found.append(replica in held[adapter])
            held[adapter].add(replica)
    print(f"{sum(found)} of {len(found)} requests found their adapter; {dict(held)}")
    assert sum(found) / len(found) >= 0.95
    assert len({replica for replicas in held.values() for replica in replicas}) > 1  # the work is shared all the same
    time.sleep(2)
    resident = sum(len(each["device"]) for each in endpoint.statistics())
    assert resident == sum(len(replicas) for replicas in held.values())  # what the servers themselves say


def test_the_base_and_errors_are_as_the_server_gives_them(endpoint: Endpoint) -> None:
    body = {"model": "demo", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda _: endpoint.http.post("/v1/completions", json=body), range(6)))
    used = Counter(answer.headers["x-lora-serve-replica"] for answer in answers)
    assert len(used) == REPLICAS  # every one has the base
    missing = endpoint.complete(TEXTS[0], "nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "adapter_not_found")
    assert missing.headers.get_list("x-request-id") != []
    assert len(missing.headers.get_list("date")) == len(missing.headers.get_list("server")) == 1
    assert endpoint.http.get("/ready").json() == {"status": "ready"}
    assert endpoint.http.get("/", headers={"Host": "elsewhere.example"}).status_code == 403
    refused = endpoint.http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/a"})
    assert refused.status_code == 400
    with pytest.raises(AssertionError, match="adapter_not_found"):
        endpoint.stream(TEXTS[0], "nobody")


def test_a_client_that_leaves_ends_its_request(endpoint: Endpoint) -> None:
    def leave(**body: object) -> None:
        given = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "adapter": "shout", **body}
        with endpoint.http.stream("POST", "/v1/completions", json=given) as response:
            next(response.iter_lines())

    leave(stream=True)
    given = {"prompt": "a", "max_tokens": 480, "ignore_eos": True, "adapter": "shout", "n": 8}
    with pytest.raises(httpx.ReadTimeout):
        endpoint.http.post("/v1/completions", json=given, timeout=0.3)
    until(lambda: sum(endpoint.running().values()) == 0, 5)


def test_a_busy_replica_gives_requests_to_others(endpoint: Endpoint) -> None:
    with ThreadPoolExecutor(24) as clients:
        answers = list(
            clients.map(lambda _: endpoint.complete(TEXTS[0], "reverse", ignore_eos=True, max_tokens=300), range(24))
        )
    assert {answer.status_code for answer in answers} == {200}
    used = Counter(answer.headers["x-lora-serve-replica"] for answer in answers)
    print(f"24 long requests of one adapter at once: {used}")
    assert len(used) > 1
    assert max(used.values()) < 24


def test_a_change_is_made_at_all_replicas_and_at_those_that_start_later(endpoint: Endpoint) -> None:
    files = [("files", (path.name, path.read_bytes())) for path in (ADAPTERS / "shout").iterdir() if path.is_file()]
    published = endpoint.http.post("/v1/adapters", data={"name": "loud"}, files=files)
    assert published.status_code == 201, published.text
    assert endpoint.http.post("/v1/adapters", data={"name": "loud"}, files=files).status_code == 409
    invalid = endpoint.http.put("/v1/adapters/bad", files=[("files", ("adapter_config.json", b"{}"))])
    assert invalid.status_code == 400
    assert endpoint.http.post("/v1/adapters/loud/pin").status_code == 200
    time.sleep(2)
    assert all("loud" in [*each["device"], *each["host"]] for each in endpoint.statistics())
    assert endpoint.http.delete("/v1/adapters/digits").status_code == 200

    victim = endpoint.servers()[0]
    victim.kill()
    until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)
    endpoint.wait_for_replicas()
    for _ in range(12):  # whichever answers
        names = {each["name"] for each in endpoint.http.get("/v1/adapters").json()["data"]}
        assert "loud" in names
        assert "digits" not in names
    # Pinned there too; an engine tells of it once a second.
    until(lambda: all("loud" in [*each["device"], *each["host"]] for each in endpoint.statistics()), 5)
    assert endpoint.complete(TEXTS[0], "loud").json()["choices"][0]["text"] == TEXTS[0].upper()


@dataclass
class Load:
    """Clients that send requests while something happens; what they got is counted."""

    endpoint: Endpoint
    whole: int = 0
    streams: int = 0
    broken: int = 0
    lost: list[str] = field(default_factory=list)

    @contextmanager
    def running(self, clients: int = 6) -> Iterator[None]:
        stop = threading.Event()
        threads = [threading.Thread(target=self._client, args=(number, stop)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(180)

    def _client(self, number: int, stop: threading.Event) -> None:
        own = random.Random(number)
        while not stop.is_set():
            adapter = own.choice(["count", "initials", "json", "reverse", "shout"])
            try:
                if number % 2:
                    answer = self.endpoint.complete(own.choice(TEXTS), adapter)
                    if answer.status_code != 200:
                        self.lost.append(answer.text)
                    self.whole += 1
                    continue
                events = self.endpoint.stream(own.choice(TEXTS), adapter, ignore_eos=True, max_tokens=200)
                self.streams += 1
                error = json.loads(events[-1]).get("error")
                if error is None:
                    continue
                if len(events) == 1:
                    self.lost.append(events[-1])  # it had not begun
                assert error["code"] == "unavailable"
                self.broken += 1
            except Exception as error:  # a connection that broke, a stream without an end
                self.lost.append(repr(error))


def _kill_server(endpoint: Endpoint) -> psutil.Process:
    server = endpoint.servers()[0]
    server.kill()
    return server


def _kill_engine(endpoint: Endpoint) -> psutil.Process:
    server = endpoint.servers()[0]
    engine = next(child for child in server.children() if "lora_serve.engine.process_main" in _command(child))
    engine.kill()
    return engine


def _kill_actor(endpoint: Endpoint) -> psutil.Process:
    actor = endpoint.servers()[0].parent()
    assert actor is not None
    os.kill(actor.pid, signal.SIGKILL)
    return actor


@pytest.mark.parametrize("kill", [_kill_server, _kill_engine, _kill_actor])
def test_a_kill_under_load_loses_no_request_that_had_not_begun(
    endpoint: Endpoint, kill: Callable[[Endpoint], psutil.Process]
) -> None:
    endpoint.wait_for_replicas()
    load = Load(endpoint)
    with load.running():
        until(lambda: load.streams > 3)
        time.sleep(1)
        server = endpoint.servers()[0]
        kill(endpoint)
        begun = time.monotonic()
        if kill is not _kill_engine:  # the server of a replica that is gone, too
            until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, 10)
        print(f"{kill.__name__}: its server ended after {time.monotonic() - begun:.1f} s")
        time.sleep(3)
        endpoint.wait_for_replicas()
        print(f"{kill.__name__}: three replicas again after {time.monotonic() - begun:.1f} s")
    print(f"{kill.__name__}: {load.whole} answers, {load.streams} streams, {load.broken} broken, lost: {load.lost[:3]}")
    assert load.lost == []


def test_replicas_follow_the_number_of_requests(endpoint: Endpoint, cluster: None, tmp_path: Path) -> None:
    from lora_serve.ray import app

    serve.delete("default")
    options: dict[str, Any] = {"model": str(DEMO), "served_model_name": "demo", "adapters": str(ADAPTERS)}
    scaling = {"replicas": 1, "max_replicas": 2, "target_requests": 2, "upscale_delay": 1, "downscale_delay": 2}
    serve.run(app({**options, **scaling, "journal": str(tmp_path)}), route_prefix="/")
    assert len(endpoint.servers()) == 1
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            assert endpoint.complete("a", "shout", ignore_eos=True, max_tokens=400).status_code == 200

    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(client, number) for number in range(8)]
        until(lambda: len(endpoint.servers()) == 2, 120)
        stop.set()
        for each in running:
            each.result()
    until(lambda: len(endpoint.servers()) == 1, 120)
