"""Aliases and copies on the real server: canary, stickiness, roll-back, conditions, restarts, and other servers."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo_variants import variant, variant_digest
from server_process import ADAPTERS, ServerProcess, status, until

from demo.tasks import TASKS, heldout_prompts
from lora_serve.cli import main

TEXT = heldout_prompts(1, seed=31)[0]
USERS = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    with ServerProcess(store, "--adapters", str(ADAPTERS), "--keep-versions", "1") as server:
        yield server


def put(server: ServerProcess, name: str, *targets: tuple[str, float], **more: Any) -> httpx.Response:
    body = {"targets": [{"adapter": adapter, "weight": weight} for adapter, weight in targets]}
    headers = more.pop("headers", {})
    return server.http.put(f"/v1/aliases/{name}", json=body | more, headers=headers)


def ask(server: ServerProcess, name: str, headers: dict[str, str] | None = None, **body: Any) -> tuple[str, str]:
    """The adapter that answered, and its text."""
    given = {"prompt": TEXT + "\n", "max_tokens": 48, "temperature": 0, "adapter": name, **body}
    answer = server.http.post("/v1/completions", json=given, headers=headers).raise_for_status().json()
    return answer["model"], answer["choices"][0]["text"]


def of_users(server: ServerProcess, name: str) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(8) as pool:
        return [*pool.map(lambda n: ask(server, name, user=f"user-{n}"), range(USERS))]


def test_a_canary_splits_users_evenly_and_each_stays_where_it_is(server: ServerProcess) -> None:
    put(server, "prod", ("shout", 50), ("reverse", 50), sticky="user").raise_for_status()
    first, again = of_users(server, "prod"), of_users(server, "prod")
    assert first == again
    assert {*first} == {(name, TASKS[name].answer(TEXT)) for name in ("shout", "reverse")}
    assert 0.3 < sum(name == "shout" for name, _ in first) / USERS < 0.7
    put(server, "prod", ("shout", 75), ("reverse", 25), sticky="user").raise_for_status()
    moved = [(old, new) for (old, _), (new, _) in zip(first, of_users(server, "prod"), strict=True) if old != new]
    assert {*moved} == {("reverse", "shout")}
    put(server, "prod", ("reverse", 1)).raise_for_status()
    assert {name for name, _ in of_users(server, "prod")} == {"reverse"}


def test_a_header_that_an_alias_goes_by_counts_as_soon_as_the_change_is_answered(server: ServerProcess) -> None:
    for round in range(5):
        header = f"X-Session-{round}"
        put(server, "session", ("shout", 1), ("reverse", 1), sticky=f"header:{header}").raise_for_status()
        for session in range(3):
            given = {"headers": {header.lower(): str(session)}, "max_tokens": 1}
            assert len({ask(server, "session", **given)[0] for _ in range(6)}) == 1  # type: ignore[arg-type]
    seen = {ask(server, "session", max_tokens=1)[0] for _ in range(30)}
    assert seen == {"shout", "reverse"}


def test_all_choices_of_a_call_are_of_one_target_in_a_composition_too(server: ServerProcess) -> None:
    put(server, "half", ("shout", 1), ("reverse", 1)).raise_for_status()
    seen = set()
    for _ in range(16):
        body = {"prompt": [TEXT + "\n"] * 3, "n": 2, "max_tokens": 48, "temperature": 0, "model": "half"}
        answer = server.http.post("/v1/completions", json=body).raise_for_status().json()
        assert {choice["text"] for choice in answer["choices"]} == {TASKS[answer["model"]].answer(TEXT)}
        seen.add(answer["model"])
        composed = [{"name": "half", "weight": 1.0}, {"name": "json", "weight": 0.0}]
        assert ask(server, composed, max_tokens=1)[0] in ("shout+json", "reverse+json")  # type: ignore[arg-type]
    assert seen == {"shout", "reverse"}


def test_each_target_s_own_settings_make_the_prompt(server: ServerProcess) -> None:
    """Two versions of one adapter that differ in their system prompt alone; the longer test is in another file."""
    paths = [ADAPTERS / "shout" / file for file in ("adapter_config.json", "adapter_model.safetensors")]
    files: list[Any] = [("files", (path.name, path.read_bytes())) for path in paths]
    tokens: dict[str, int] = {}  # by version: of the prompt
    for system in ("a", "two red foxes"):
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        settings = f"system: {system}\nmax_tokens: 1\nchat_template: '{template}'"
        answer = server.http.put("/v1/adapters/fox", files=[*files, ("settings", (None, settings))]).json()
        version, *older = answer["versions"]
        assert version["settings"] == {"system": system, "max_tokens": 1, "chat_template": template}
        text = server.http.post("/tokenize", json={"prompt": f"{system}hi", "add_special_tokens": False}).json()
        tokens[f"fox@{version['digest'][:12]}"] = text["count"]
        put(server, "zoo", *((f"fox@{each['digest']}", 1) for each in (version, *older))).raise_for_status()
    seen = set()
    for name in ("zoo",) * 12 + ("fox",):
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
        answer = server.http.post("/v1/chat/completions", json=body).raise_for_status().json()
        seen.add((answer["adapter"], answer["usage"]["prompt_tokens"]))
        assert answer["usage"]["completion_tokens"] == 1
    assert seen == {*tokens.items()}


def test_rolling_back_to_a_version_that_the_alias_keeps_needs_no_upload(server: ServerProcess, tmp_path: Path) -> None:
    for number in range(2):
        server.http.put("/v1/adapters/mine", **variant(number)).raise_for_status()
    first, second = variant_digest(0), variant_digest(1)
    listed = server.http.get("/v1/adapters/mine").json()["versions"]
    assert [each["digest"] for each in listed] == [second]  # one is kept
    put(server, "live", (f"mine@{second[:10]}", 1)).raise_for_status()
    server.http.put("/v1/adapters/mine", **variant(0)).raise_for_status()
    put(server, "live", (f"mine@{first}", 1), (f"mine@{second}", 0)).raise_for_status()

    def answering() -> str:
        body = {"prompt": TEXT, "adapter": "live", "max_tokens": 1}
        return str(server.http.post("/v1/completions", json=body).raise_for_status().json()["adapter"])

    assert answering() == f"mine@{first[:12]}"
    back = put(server, "live", (f"mine@{second}", 1)).raise_for_status()
    assert answering() == f"mine@{second[:12]}"
    assert back.json()["targets"] == [{"adapter": f"mine@{second}", "weight": 1.0}]
    refused = server.http.delete("/v1/adapters/mine")
    assert (refused.status_code, "alias live" in refused.json()["error"]["message"]) == (409, True)
    server.http.delete("/v1/aliases/live").raise_for_status()

    def kept() -> list[str]:
        return [each["digest"] for each in server.http.get("/v1/adapters/mine").json()["versions"]]

    until(lambda: kept() == [first])
    server.http.delete("/v1/adapters/mine").raise_for_status()


def test_of_many_changes_with_one_condition_one_is_made(server: ServerProcess) -> None:
    etag = put(server, "race", ("shout", 1)).headers["ETag"]
    with ThreadPoolExecutor(6) as pool:
        answers = [*pool.map(lambda n: put(server, "race", ("shout", n + 2), headers={"If-Match": etag}), range(6))]
    assert sorted(each.status_code for each in answers) == [200, *[412] * 5]
    made = next(each for each in answers if each.status_code == 200)
    assert server.http.get("/v1/aliases/race").json() == made.json()
    published = server.http.put("/v1/adapters/raced", **variant(0), headers={"If-None-Match": "*"})
    assert published.status_code == 201

    def replace(number: int) -> int:
        headers = {"If-Match": published.headers["ETag"]}
        return server.http.put("/v1/adapters/raced", **variant(number), headers=headers).status_code

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(replace, (1, 2, 3))) == [201, 412, 412]
    again = server.http.put("/v1/adapters/raced", **variant(0), headers={"If-None-Match": "*"})
    assert again.status_code == 412


def test_what_was_uploaded_comes_back_byte_for_byte_and_is_the_same_version_where_it_is_pushed(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = server.http.get("/v1/adapters/shout").json()["versions"][0]["digest"]
    assert main(["adapter", "pull", "shout", "--to", str(tmp_path / "copy" / "mine"), "--url", server.url]) == 0
    assert capsys.readouterr().out == f"shout@{digest[:12]} → {tmp_path / 'copy' / 'mine'}\n"
    pulled = {path.name: path.read_bytes() for path in (tmp_path / "copy" / "mine").iterdir()}
    assert pulled.keys() >= {"adapter_config.json", "adapter_model.safetensors"}
    for name, content in pulled.items():
        assert content == (ADAPTERS / "shout" / name).read_bytes()
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["mine"]
    assert main(["adapter", "pull", "shout", "--to", str(tmp_path / "copy" / "mine"), "--url", server.url]) == 1
    assert main(["adapter", "pull", "shout@000", "--to", str(tmp_path / "x"), "--url", server.url]) == 1
    assert "404" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    push = ["adapter", "push", f"shout@{digest[:8]}", "--url", server.url, "--to", server.url, "--as", "loud"]
    assert main(push) == 0
    assert f"published loud@{digest[:12]}" in capsys.readouterr().out
    assert main(push) == 1  # the name is taken
    assert main([*push, "--replace"]) == 0
    there = server.http.get("/v1/adapters/loud")
    assert there.headers["ETag"] == f'"{digest}"'
    assert server.complete(TEXT, "loud") == TEXT.upper()
    weights = server.store / "versions" / digest / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert main(["adapter", "pull", "loud", "--to", str(tmp_path / "y"), "--url", server.url]) == 1
    assert capsys.readouterr().err.startswith(f"lora-serve: no answer from {server.url}")
    assert not (tmp_path / "y").exists()
    until(lambda: any("has been altered in the store" in line for line in server.log))
    weights.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["engine", "server"])
def test_aliases_survive_kills_as_they_were_answered(tmp_path: Path, victim: str) -> None:
    chosen, stop = random.Random(victim), threading.Event()
    answered: list[dict[str, Any]] = []
    asked: list[list[dict[str, Any]]] = []

    def change(server: ServerProcess) -> None:
        while not stop.is_set():
            digest = variant_digest(chosen.randrange(3))
            targets = [
                {"adapter": f"mine@{digest}", "weight": chosen.randrange(1, 9)},
                {"adapter": "mine", "weight": 1},
            ]
            asked.append(targets)
            try:
                answer = server.http.put("/v1/aliases/prod", json={"targets": targets})
            except httpx.TransportError:
                return
            if answer.status_code != 200:
                return
            answered.append(answer.json())

    def check(server: ServerProcess) -> None:
        found = server.http.get("/v1/aliases/prod").json()
        assert found["broken"] is None
        assert found["targets"] in (answered[-1]["targets"], asked[-1])
        assert server.complete(TEXT, "prod") == TEXT.upper()

    with ServerProcess(tmp_path / "store", "--keep-versions", "3") as server:
        for number in range(3):
            server.http.put("/v1/adapters/mine", **variant(number)).raise_for_status()
        thread = threading.Thread(target=change, args=(server,))
        thread.start()
        until(lambda: len(answered) > 3, 60)
        time.sleep(chosen.uniform(0, 0.3))
        if victim == "server":
            server.signal(signal.SIGKILL)
        else:
            os.kill(server.engine_pid, signal.SIGKILL)
        thread.join(60)
        stop.set()
        if victim == "engine":
            until(lambda: status(server, "/ready") == 503, 30)
            until(lambda: status(server, "/ready") == 200, 60)
            check(server)
    with ServerProcess(tmp_path / "store", "--keep-versions", "1") as server:
        check(server)
