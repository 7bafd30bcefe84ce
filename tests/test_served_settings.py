"""An adapter with a system prompt and a chat template on the real server: changed under load, aliased, copied."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from server_process import ADAPTERS, DEMO, ServerProcess
from transformers import AutoTokenizer

from lora_serve.cli import main

SETTINGS = """
system: {system}
temperature: 0
max_tokens: 3
chat_template: "{{% for m in messages %}}{{{{ m.role }}}}={{{{ m.content }}}}\\n{{% endfor %}}"
"""
HI = [{"role": "user", "content": "two red foxes run"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("store")) as server:
        yield server


def publish(server: ServerProcess, name: str, system: str) -> str:
    """Publish the adapter `shout` with a system prompt; returns the digest."""
    paths = [ADAPTERS / "shout" / file for file in ("adapter_config.json", "adapter_model.safetensors")]
    files: list[Any] = [("files", (path.name, path.read_bytes())) for path in paths]
    files.append(("settings", (None, SETTINGS.format(system=system))))
    answer = server.http.put(f"/v1/adapters/{name}", files=files).raise_for_status().json()
    return str(answer["versions"][0]["digest"])


def prompt_tokens(system: str) -> int:
    """The length of the prompt, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = SETTINGS.format(system="").split('chat_template: "')[1].rstrip('"\n').replace("\\n", "\n")
    talk = [{"role": "system", "content": system}, *HI]
    return len(tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False))


def ask(server: ServerProcess, name: str) -> tuple[str, int]:
    """The version that answered, and the length of the prompt."""
    body = {"model": name, "messages": HI}
    answer = server.http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return answer["adapter"], answer["usage"]["prompt_tokens"]


@pytest.mark.slow
def test_every_answer_is_by_the_settings_of_the_version_that_it_names(server: ServerProcess) -> None:
    systems = ["a", "be a fox", "be a fox and then another and another"]
    length = {publish(server, "fox", system)[:12]: prompt_tokens(system) for system in systems}
    assert len({*length.values()}) == 3
    targets = [{"adapter": f"fox@{digest}", "weight": 1} for digest in length]
    server.http.put("/v1/aliases/zoo", json={"targets": targets}).raise_for_status()
    seen, ended = [], threading.Event()

    def ask_on() -> None:
        while not ended.is_set():
            seen.extend(ask(server, name) for name in ("fox", "zoo"))

    threads = [threading.Thread(target=ask_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    for system in systems * 3:
        digest = publish(server, "fox", system)
        assert ask(server, "fox")[0] == f"fox@{digest[:12]}"  # at once
    ended.set()
    for thread in threads:
        thread.join(20)
    assert len({version for version, _ in seen}) == 3
    assert {(version, length[version.removeprefix("fox@")]) for version, _ in seen} == {*seen}
    # A copy, by the command line: the same version, and so the same settings.
    main(["adapter", "push", "fox", "--url", server.url, "--to", server.url, "--as", "wolf"])
    assert ask(server, "wolf")[1] == length[ask(server, "wolf")[0].removeprefix("wolf@")]
