"""The real server under faults: floods of adapters, killed processes, clients that disconnect."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from demo_variants import variant
from safetensors.torch import load_file, save
from server_process import ADAPTERS, DEMO, ServerProcess, status, until

from demo.tasks import TASKS, heldout_prompts

FLOOD = 200


def as_dora(name: str) -> list[tuple[str, tuple[str, bytes]]]:
    """Files of the DoRA adapter that equals a demo adapter: its magnitudes are the norms of the merged weights."""
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    tensors = load_file(ADAPTERS / name / "adapter_model.safetensors")
    base = load_file(DEMO / "model.safetensors")
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        site = key.removesuffix(".lora_A.weight")
        a, b = tensors[key].float(), tensors[f"{site}.lora_B.weight"].float()
        merged = (
            base[f"{site.removeprefix('base_model.model.')}.weight"].float() + config["lora_alpha"] / len(a) * b @ a
        )
        tensors[f"{site}.lora_magnitude_vector"] = merged.norm(dim=1)
    return [
        ("files", ("adapter_config.json", json.dumps(config | {"use_dora": True}).encode())),
        ("files", ("adapter_model.safetensors", save(tensors))),
    ]


def upload(server: ServerProcess, name: str, number: int = 0) -> httpx.Response:
    return server.http.post("/v1/adapters", data={"name": name}, **variant(number))


class Stream(threading.Thread):
    """A long streamed completion in a thread: its chunks, their times, and its end."""

    def __init__(
        self, server: ServerProcess, prompt: str, adapter: str | None = None, *, max_tokens: int = 400
    ) -> None:
        super().__init__(daemon=True)
        self._served = server
        self._body = {
            "prompt": prompt + "\n", "adapter": adapter, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        self.chunks: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.done = False
        self.refused = 0
        self.start()

    def run(self) -> None:
        with self._served.http.stream("POST", "/v1/completions", json=self._body) as answer:
            if answer.status_code != 200:
                self.refused = answer.status_code
                return
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self.chunks.append(json.loads(line.removeprefix("data: ")))
                    self.times.append(time.monotonic())

    @property
    def error(self) -> dict[str, Any] | None:
        last = self.chunks[-1] if self.chunks else {}
        found: dict[str, Any] | None = last.get("error")
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "store", "--adapters", str(ADAPTERS)) as server:
        yield server


def test_two_hundred_uploads_beside_running_streams_with_memory_for_eight(tmp_path: Path) -> None:
    cache_bytes = 8 * 110_000  # bytes; one variant takes about 100,000
    with ServerProcess(
        tmp_path / "store", "--adapter-slots", "8", "--adapter-cache-memory", str(cache_bytes)
    ) as server:
        upload(server, "first").raise_for_status()
        prompts = heldout_prompts(FLOOD, seed=21)
        streams = [Stream(server, prompts[i], "first" if i % 2 else None) for i in range(8)]
        with ThreadPoolExecutor(4) as pool:
            codes = [*pool.map(lambda n: upload(server, f"a{n:03}", n + 1).status_code, range(FLOOD))]
        assert codes == [201] * FLOOD
        with ThreadPoolExecutor(16) as pool:
            answers = [*pool.map(lambda n: server.complete(prompts[n], f"a{n:03}"), range(FLOOD))]
        assert answers == [text.upper() for text in prompts]
        for stream in streams:
            stream.join(60)
            assert stream.done
            assert stream.error is None
            assert stream.chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert max(gap for s in streams for gap in map(float.__sub__, s.times[1:], s.times)) < 2.0
        assert 0 < server.metric("lora_serve_adapter_bytes") <= 2 * cache_bytes  # both tiers
        for n in range(FLOOD):
            server.http.delete(f"/v1/adapters/a{n:03}").raise_for_status()
        server.http.post("/v1/adapters/first/evict").raise_for_status()
        until(lambda: server.metric("lora_serve_adapter_bytes") == 0)
        until(lambda: len([*(tmp_path / "store" / "versions").iterdir()]) == 1)


def test_an_engine_killed_under_load_restarts_with_all_adapters(server: ServerProcess) -> None:
    upload(server, "mine").raise_for_status()
    text = heldout_prompts(1, seed=22)[0]
    streams = [Stream(server, text, "mine" if n % 2 else None) for n in range(6)]
    until(lambda: all(stream.chunks for stream in streams))
    os.kill(server.engine_pid, signal.SIGKILL)
    until(lambda: status(server, "/ready") == 503)
    for stream in streams:
        stream.join(10)
        assert stream.done
        assert stream.error is not None
        assert stream.error["code"] == "unavailable"
    until(lambda: status(server, "/ready") == 200, 60)
    assert status(server, "/health") == 200
    assert server.complete(text, "mine") == text.upper()
    assert server.complete(text, "reverse") == TASKS["reverse"].answer(text)


def test_sigterm_lets_running_streams_finish_and_exits_0(server: ServerProcess) -> None:
    stream = Stream(server, "two red foxes run", max_tokens=300)
    until(lambda: bool(stream.chunks))
    server.signal(signal.SIGTERM)
    until(lambda: status(server, "/ready") in (503, 0))
    stream.join(30)
    assert stream.done
    assert stream.error is None
    assert server.wait(20) == 0


def test_sigterm_ends_unfinished_streams_with_an_error_after_the_drain_timeout(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "store", "--drain-timeout", "0.2") as server:
        streams = [Stream(server, "two red foxes run") for _ in range(4)]
        until(lambda: all(stream.chunks for stream in streams))
        server.signal(signal.SIGTERM)
        for stream in streams:
            stream.join(20)
            assert stream.done
        assert any(stream.error is not None for stream in streams)
        assert server.wait(20) == 0


def raw(server: ServerProcess, body: dict[str, Any]) -> socket.socket:
    """A socket on which a completion request was sent."""
    where = urlsplit(server.url)
    connection = socket.create_connection((where.hostname or "", where.port or 0))
    text = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(text)}\r\n\r\n"
    connection.sendall(head.encode() + text)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_all_resources(server: ServerProcess, stream: bool) -> None:
    body = {
        "prompt": "two red foxes run\n",
        "max_tokens": 480,
        "ignore_eos": True,
        "stream": stream,
        "adapter": "shout",
    }
    connections = [raw(server, body) for _ in range(3)]
    until(lambda: server.metric("lora_serve_sequences_running") == 3)
    for connection in connections:
        connection.close()
    until(lambda: server.metric("lora_serve_sequences_running") == 0, 1.5)
    until(lambda: server.metric("lora_serve_kv_blocks_used") == 0, 1.5)
    assert server.http.get("/v1/adapters/shout").json()["versions"][0]["leases"] == 0
    assert server.metric("lora_serve_prompt_tokens_total") > 0
    assert server.log
    assert not [line for line in server.log if "Traceback" in line]


def test_a_full_queue_is_429_and_the_server_keeps_serving(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "store", "--max-num-seqs", "1", "--max-queue", "1") as server:
        streams = [Stream(server, "two red foxes run")]
        until(lambda: bool(streams[0].chunks))
        streams += [Stream(server, "two red foxes run") for _ in range(6)]
        until(lambda: sum(stream.refused == 429 for stream in streams) >= 5)
        refused = server.http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        for stream in streams:
            stream.join(30)
        assert server.complete("two red foxes run") == "two red foxes run"


def test_a_new_version_serves_new_requests_while_the_old_one_finishes(server: ServerProcess) -> None:
    text = heldout_prompts(1, seed=23)[0]
    first = upload(server, "mine").json()["versions"][0]["digest"]
    old = Stream(server, text, "mine")
    until(lambda: len(old.chunks) > 3)
    files = {
        "files": [
            ("files", (name, (ADAPTERS / "reverse" / name).read_bytes()))
            for name in ("adapter_config.json", "adapter_model.safetensors")
        ]
    }
    assert upload(server, "mine", 1).status_code == 409
    second = server.http.put("/v1/adapters/mine", **files).json()
    assert [version["digest"] for version in second["versions"]][1:] == [first]
    body = {"prompt": text + "\n", "max_tokens": 48, "temperature": 0}
    answer = server.http.post("/v1/completions", json=body | {"adapter": "mine"}).json()
    assert answer["choices"][0]["text"] == TASKS["reverse"].answer(text)
    assert answer["adapter"] == f"mine@{second['versions'][0]['digest'][:12]}"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    pinned = server.http.post("/v1/completions", json=body | {"adapter": f"mine@{first[:12]}"}).json()
    assert pinned["choices"][0]["text"] == text.upper()
    old.join(30)
    assert old.done
    assert old.error is None
    assert {chunk["adapter"] for chunk in old.chunks} == {f"mine@{first[:12]}"}
    kept = server.http.post("/v1/completions", json=body | {"adapter": f"mine@{first[:12]}"}).json()
    assert kept["choices"][0]["text"] == text.upper()


def test_adapters_are_loaded_pinned_evicted_and_deleted_over_http(server: ServerProcess) -> None:
    def tiers(action: str = "") -> list[str]:
        answer = server.http.post(f"/v1/adapters/mine{action}") if action else server.http.get("/v1/adapters/mine")
        answer.raise_for_status()
        found: list[str] = answer.json()["versions"][0]["tiers"]
        return found

    assert upload(server, "mine").status_code == 201
    assert tiers() == ["disk"]
    assert tiers("/load") == ["disk", "host", "device"]
    assert tiers("/evict") == ["disk"]
    assert "device" in tiers("/pin")
    assert server.http.post("/v1/adapters/mine/evict").status_code == 409
    assert "device" in tiers("/unpin")
    server.http.delete("/v1/adapters/mine").raise_for_status()
    assert server.http.get("/v1/adapters/mine").status_code == 404
    broken = server.http.post(
        "/v1/adapters",
        data={"name": "broken"},
        files=[
            ("files", ("adapter_config.json", b'{"peft_type": "LORA", "use_dora": true}')),
            ("files", ("adapter_model.safetensors", (ADAPTERS / "shout" / "adapter_model.safetensors").read_bytes())),
        ],
    )
    assert broken.status_code == 422
    assert "use_dora" in broken.json()["error"]["message"]


def test_a_seeded_request_is_reproducible_alone_and_in_a_batch(server: ServerProcess) -> None:
    body = {
        "prompt": "two red\n",
        "temperature": 2.0,
        "seed": 5,
        "max_tokens": 40,
        "ignore_eos": True,
        "adapter": "count",
    }

    def ask() -> str:
        text: str = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    alone = ask()
    company = [Stream(server, "ten owls sing", name) for name in (None, "shout", "json")]
    until(lambda: all(stream.chunks for stream in company))
    assert ask() == alone
    for stream in company:
        stream.join(30)


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.slow)])
def test_adapters_loaded_and_evicted_under_traffic_change_no_answer(server: ServerProcess, seconds: float) -> None:
    server.http.post("/v1/adapters", data={"name": "dora"}, files=as_dora("shout")).raise_for_status()
    routes: list[Any] = [None, None, None, "dora", "reverse", "count"]
    routes += [[{"name": "shout", "weight": 0.5}, {"name": "json", "weight": 0.5}]]
    texts = heldout_prompts(8, seed=24)
    engine = server.engine_pid
    idle = {(n, text): server.complete(text, route) for n, route in enumerate(routes) for text in texts}
    assert all(idle[routes.index("dora"), text] == text.upper() for text in texts)
    stop = time.monotonic() + seconds

    def client(number: int) -> int:
        chosen, answers = random.Random(number), 0
        while time.monotonic() < stop:
            n, text = chosen.randrange(len(routes)), chosen.choice(texts)
            assert server.complete(text, routes[n]) == idle[n, text]
            answers += 1
        return answers

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        while time.monotonic() < stop and not any(each.done() for each in clients):
            for name in ("dora", "shout", "reverse"):
                server.http.post(f"/v1/adapters/{name}/evict").raise_for_status()
            time.sleep(0.02)
        asked = sum(each.result() for each in clients)
    assert asked > 8
    assert server.engine_pid == engine


def test_killed_compilers_cost_their_uploads_and_nothing_else(tmp_path: Path) -> None:
    """Each process that lowers an adapter, and twice the one that they are forked from, is killed while uploads run."""
    with ServerProcess(tmp_path / "store") as server:
        stop = threading.Event()
        killed = [0]

        def kill() -> None:
            while not stop.is_set():
                for parent in psutil.Process(server.engine_pid).children():
                    running = parent.children()
                    if running and (chosen := random.choice([*running, *[parent] * (killed[0] % 10 == 5)])):
                        with suppress(psutil.NoSuchProcess):
                            chosen.kill()
                            killed[0] += 1
                time.sleep(random.uniform(0, 0.3))

        thread = threading.Thread(target=kill)
        thread.start()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: upload(server, f"a{number}", number).status_code, range(24)))
        stop.set()
        thread.join()
        assert set(answers) <= {201, 500}
        assert killed[0] >= answers.count(500) > 0
        listed = {each["name"] for each in server.http.get("/v1/adapters").json()["data"]}
        assert listed == {f"a{number}" for number, answer in enumerate(answers) if answer == 201}
        assert upload(server, "after", 99).status_code == 201
        text = heldout_prompts(1)[0]
        for name in [*sorted(listed)[:3], "after"]:
            assert server.complete(text, name) == text.upper()
        assert not any((tmp_path / "store" / "staging").iterdir())
