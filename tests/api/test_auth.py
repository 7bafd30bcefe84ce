"""API keys: authentication, permissions, and the format of key files."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_admin import StubAdminApp, refusal

from lora_serve.api.auth import Caller, Keys, hash_key, load_keys
from lora_serve.errors import BadRequest
from lora_serve.messages import AdapterInfo

OPEN = {"/health", "/ready"}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    file = tmp_path / "keys.yaml"
    file.write_text(
        f"user: {hash_key('sk-user')}\n"
        f"poets: {{hash: '{hash_key('sk-poets')}', adapters: [poet, 'poet-*']}}\n"
        f"boss: {{hash: '{hash_key('sk-boss')}', admin: true}}\n"
    )
    loaded = load_keys(file)
    assert loaded is not None
    return loaded


@pytest.fixture
def server(tmp_path: Path, keys: Keys) -> StubAdminApp:
    server = StubAdminApp(tmp_path / "store", keys)
    for name in ("poet", "poet-2", "coder"):
        server.engine.adapters[name] = AdapterInfo(name, False, [])
    return server


def test_keys_are_looked_up_by_their_full_text(keys: Keys) -> None:
    assert repr(keys) == "<Keys 3 keys, 1 of admins>"
    assert keys.find("sk-user") == Caller("user")
    assert keys.find("sk-poets") == Caller("poets", adapters=("poet", "poet-*"))
    assert keys.find("sk-boss") == Caller("boss", admin=True)
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
        (f"a: {hash_key('x')}\nb: {hash_key('x')}", "b and a have the same key"),
    ],
)
def test_an_invalid_key_file_is_refused_naming_the_entry(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(BadRequest, match=complaint) as refused:
        Keys.load(file)
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


async def test_with_keys_the_schema_is_not_served(server: StubAdminApp) -> None:
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert (await server.ask("GET", path)).status_code == 401
        assert (await server.ask("GET", path, key="sk-boss")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/adapters"),
        ("PUT", "/v1/adapters/poet"),
        ("DELETE", "/v1/adapters/poet"),
        ("POST", "/v1/adapters/poet/load"),
        ("POST", "/v1/adapters/poet/evict"),
        ("POST", "/v1/adapters/poet/pin"),
        ("POST", "/v1/adapters/poet/unpin"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ],
)
async def test_changing_adapters_needs_an_admin_key(server: StubAdminApp, method: str, path: str) -> None:
    assert (
        refusal(await server.ask(method, path, key="sk-user", json={"lora_name": "poet", "lora_path": "/"}))[0] == 403
    )
    assert server.engine.operations == []
    answer = await server.ask(method, path, key="sk-boss", json={"lora_name": "poet", "lora_path": "/"})
    assert answer.status_code in (200, 400)


async def test_a_limited_key_sees_only_its_adapters(server: StubAdminApp) -> None:
    listed = (await server.ask("GET", "/v1/adapters", key="sk-poets")).json()["data"]
    assert [info["name"] for info in listed] == ["poet", "poet-2"]
    assert (await server.ask("GET", "/v1/adapters/poet-2", key="sk-poets")).status_code == 200
    hidden = refusal(await server.ask("GET", "/v1/adapters/coder", key="sk-poets"))
    absent = refusal(await server.ask("GET", "/v1/adapters/nobody", key="sk-user"))
    assert hidden[0] == absent[0] == 404
    assert hidden[1:] == (absent[1], absent[2].replace("nobody", "coder"))
