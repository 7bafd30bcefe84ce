"""API keys: authentication, permissions, and the format of key files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from stub_admin import FILES, StubAdminApp, refusal

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import RECHECK, KeyFile, Keys, hash_key, load_keys
from lora_serve.errors import BadRequest
from lora_serve.messages import AdapterFiles, AdapterInfo, AdapterVersion

OPEN = {"/health", "/ready"}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    file = tmp_path / "keys.yaml"
    file.write_text(
        f"user: {hash_key('sk-user')}\n"
        f"poets: {{hash: '{hash_key('sk-poets')}', adapters: [poet, 'poet-*']}}\n"
        f"boss: {{hash: '{hash_key('sk-boss')}', admin: true}}\n"
        f"head-poet: {{hash: '{hash_key('sk-head')}', admin: true, adapters: ['poet*']}}\n"
        f"watch: {{hash: '{hash_key('sk-watch')}', metrics: true}}\n"
        f"large: {{hash: '{hash_key('sk-large')}', share: 3}}\n"
    )
    loaded = load_keys(file)
    assert loaded is not None
    return loaded


@pytest.fixture
def server(tmp_path: Path, keys: Keys) -> StubAdminApp:
    server = StubAdminApp(tmp_path / "store", keys)
    version = AdapterVersion("d" * 64, 5.5, 8, 2, 10, 10, ["disk"], 0)
    for name in ("poet", "poet-2", "coder"):
        server.engine.adapters[name] = AdapterInfo(name, False, [version])
    return server


def test_keys_are_looked_up_by_their_full_text(keys: Keys) -> None:
    assert repr(keys) == "<KeyFile 6 keys, 2 of admins>"
    assert keys.find("sk-user") == Caller("user")
    assert keys.find("sk-poets") == Caller("poets", adapters=("poet", "poet-*"))
    assert keys.find("sk-boss") == Caller("boss", admin=True)
    assert keys.find("sk-large") == Caller("large", share=3.0)
    for wrong in ("", "sk-use", "sk-user ", hash_key("sk-user")):
        assert keys.find(wrong) is None


def test_without_a_key_file_there_are_no_keys() -> None:
    assert load_keys(None) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must map names"),
        ("- a", "must map names"),
        ("a: [", "cannot be read"),
        ("user: sk-plain", "user: not the hash"),
        (f"user: {{hash: '{hash_key('x')}', amdin: true}}", "user.amdin"),
        (f"user: {{hash: '{hash_key('x')}', adapters: poet}}", "user.adapters"),
        (f"user: {{hash: '{hash_key('x')}', adapters: [poet], metrics: true}}", "user: metrics tell of all adapters"),
        (f"user: {{hash: '{hash_key('x')}', share: 0}}", "user.share: Input should be greater than or equal to 0.01"),
        (f"a: {hash_key('x')}\nb: {hash_key('x')}", "b and a have the same key"),
        (f"a: {hash_key('x')}\na: {hash_key('y')}", "line 2: a name occurs twice"),
        (f"1: {hash_key('x')}", "the name of entry 1 is no text"),
        (f"a: &a {{hash: '{hash_key('x')}', admin: true}}\nb: {{<<: *a}}", "line 2: << is not read here"),
        (f"sk-plain: {hash_key('x')}", "entry 1 has a key where its owner's name should be"),
        ("user: sk-plain: x", "cannot be read, line 1"),
    ],
)
def test_an_invalid_key_file_is_refused_naming_the_entry(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(BadRequest, match=complaint) as refused:
        KeyFile(file)
    assert "sk-plain" not in refused.value.message


async def test_a_key_may_come_in_anthropic_s_header(server: StubAdminApp) -> None:
    for headers, status in (
        ({"x-api-key": "sk-user"}, 200),
        ({"X-Api-Key": "sk-wrong"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "sk-user", "Authorization": "Bearer sk-wrong"}, 401),
        ({"x-api-key": "sk-wrong", "Authorization": "Bearer sk-user"}, 200),
    ):
        assert (await server.client.get("/v1/adapters", headers=headers)).status_code == status, headers


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ", "Bearer sk-wrong", "Basic sk-user", "sk-user"])
async def test_no_key_or_a_wrong_one_is_401(server: StubAdminApp, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = await server.client.get("/v1/adapters", headers=headers)
    assert refusal(answer)[0] == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_every_route_but_health_needs_a_key(server: StubAdminApp) -> None:
    routes = server.app.openapi()["paths"]
    assert routes.keys() >= {"/v1/adapters", "/metrics", *OPEN}
    for path, methods in routes.items():
        for method in methods:
            answer = await server.ask(method.upper(), path.replace("{name}", "poet"), json={})
            assert (answer.status_code == 401) == (path not in OPEN), f"{method} {path}"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/adapters"),
        ("PUT", "/v1/adapters/poet"),
        ("DELETE", "/v1/adapters/poet"),
        ("GET", "/v1/adapters/poet/files"),
        ("POST", "/v1/adapters/poet/load"),
        ("POST", "/v1/adapters/poet/evict"),
        ("POST", "/v1/adapters/poet/pin"),
        ("POST", "/v1/adapters/poet/unpin"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/load_lora_adapter"),
        ("POST", "/unload_lora_adapter"),
    ],
)
async def test_changing_adapters_needs_an_admin_key(server: StubAdminApp, method: str, path: str) -> None:
    sent = {"lora_name": "poet"} | ({} if "unload" in path else {"lora_path": "/"})
    assert refusal(await server.ask(method, path, key="sk-user", json=sent))[0] == 403
    assert server.engine.operations == []
    server.engine.files = AdapterFiles("poet", "d" * 64, "", {})
    answer = await server.ask(method, path, key="sk-boss", json=sent)
    assert answer.status_code in (200, 400)


async def test_a_limited_key_sees_only_its_adapters(server: StubAdminApp) -> None:
    listed = (await server.ask("GET", "/v1/adapters", key="sk-poets")).json()["data"]
    assert [info["name"] for info in listed] == ["poet", "poet-2"]
    assert (await server.ask("GET", "/v1/adapters/poet-2", key="sk-poets")).status_code == 200
    hidden = refusal(await server.ask("GET", "/v1/adapters/coder", key="sk-poets"))
    absent = refusal(await server.ask("GET", "/v1/adapters/nobody", key="sk-user"))
    assert hidden[0] == absent[0] == 404
    assert hidden[1:] == (absent[1], absent[2].replace("nobody", "coder"))


# --- a limit to some adapters, on every route ------------------------------------------------------------------------

UPLOAD = {"files": [("name", (None, b"coder")), *[("files", item) for item in FILES.items()]]}


@pytest.mark.parametrize(
    ("method", "path", "given"),
    [
        ("GET", "/v1/adapters/{}", {}),
        ("GET", "/v1/adapters/{}/files", {}),
        ("POST", "/v1/adapters/{}/load", {}),
        ("POST", "/v1/adapters/{}/evict", {}),
        ("POST", "/v1/adapters/{}/pin", {}),
        ("POST", "/v1/adapters/{}/unpin", {}),
        ("DELETE", "/v1/adapters/{}", {}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "{}"}),
        ("POST", "/unload_lora_adapter", {"lora_name": "{}"}),
    ],
)
async def test_an_admin_key_of_some_adapters_does_not_reach_others(
    server: StubAdminApp, method: str, path: str, given: dict[str, str]
) -> None:
    async def ask(name: str) -> httpx.Response:
        body = {field: value.format(name) for field, value in given.items()}
        return await server.ask(method, path.format(name), key="sk-head", json=body or None)

    server.engine.files = AdapterFiles("poet", "d" * 64, "", {})
    hidden, absent = await ask("coder"), await ask("nobody")
    assert hidden.status_code == absent.status_code == 404
    assert hidden.text == absent.text.replace("nobody", "coder")
    assert server.engine.adapters.keys() == {"poet", "poet-2", "coder"}
    assert (await ask("poet")).status_code != 404


@pytest.mark.parametrize(
    ("method", "path", "given"),
    [
        ("POST", "/v1/adapters", UPLOAD),
        ("PUT", "/v1/adapters/coder", UPLOAD),
        ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "coder", "lora_path": "/x", "load_inplace": True}}),
        ("POST", "/load_lora_adapter", {"json": {"lora_name": "coder", "lora_path": "/x"}}),
    ],
)
async def test_an_admin_key_of_some_adapters_publishes_no_others(
    server: StubAdminApp, method: str, path: str, given: dict[str, Any]
) -> None:
    status, param, message = refusal(await server.ask(method, path, key="sk-head", **given))
    assert (status, message) == (403, "this key may not publish an adapter of that name")
    assert param == ("lora_name" if "json" in given else "name")
    assert server.engine.published == []


async def test_an_admin_key_of_some_adapters_publishes_these(server: StubAdminApp) -> None:
    given = [("files", item) for item in FILES.items()]
    assert (await server.ask("PUT", "/v1/adapters/poet-3", key="sk-head", files=given)).status_code == 201


@pytest.mark.parametrize(
    ("key", "status"), [("sk-user", 403), ("sk-poets", 403), ("sk-head", 403), ("sk-boss", 200), ("sk-watch", 200)]
)
async def test_metrics_tell_of_all_adapters_so_they_need_a_permission(
    server: StubAdminApp, key: str, status: int
) -> None:
    answer = await server.ask("GET", "/metrics", key=key)
    assert answer.status_code == status
    if status == 403:
        assert "metrics: true" in refusal(answer)[2]


# --- a key file that changes -----------------------------------------------------------------------------------------


class Watched:
    """A key file with the key `sk-a`, and a clock that tests set."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write(f"a: {hash_key('sk-a')}")
        self.now = 0.0
        self.keys = KeyFile(path, clock=lambda: self.now)

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def pass_time(self) -> None:
        self.now += RECHECK

    def valid(self) -> set[str]:
        return {key for key in ("sk-a", "sk-b") if self.keys.find(key)}


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "watched.yaml")


def test_a_changed_key_file_is_read_again_within_a_second(watched: Watched) -> None:
    watched.write(f"bert: {hash_key('sk-b')}")
    assert watched.valid() == {"sk-a"}
    watched.pass_time()
    assert watched.valid() == {"sk-b"}


def test_a_change_that_keeps_the_size_is_seen_by_its_time(watched: Watched) -> None:
    before = watched.path.stat()
    watched.write(f"a: {hash_key('sk-b')}")
    os.utime(watched.path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert watched.path.stat().st_size == before.st_size
    watched.pass_time()
    assert watched.valid() == {"sk-b"}


@pytest.mark.parametrize("text", ["a: [", "", "a: sk-plain", None])
def test_a_broken_new_key_file_keeps_the_keys_and_logs_one_line(
    watched: Watched, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    watched.path.unlink() if text is None else watched.write(text)
    for _ in range(3):
        watched.pass_time()
        assert watched.valid() == {"sk-a"}
    assert len(caplog.records) == 1
    assert "\n" not in caplog.text.strip()
    assert "sk-plain" not in caplog.text
    watched.write(f"b: {hash_key('sk-b')}")
    watched.pass_time()
    assert watched.valid() == {"sk-b"}
