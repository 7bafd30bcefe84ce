"""Admin routes: the operations they call and the responses they give."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgspec
import pytest
import uvicorn
from stub_admin import FILES, REPORT, StubAdminApp, adapter_folder, refusal, tar

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.cli import main
from lora_serve.errors import AdapterInvalid
from lora_serve.messages import (
    AdapterInfo,
    DeleteAdapter,
    DescribeAdapter,
    EvictAdapter,
    Inspection,
    LoadAdapter,
    PinAdapter,
    Publish,
)


@pytest.fixture
def server(tmp_path: Path) -> StubAdminApp:
    return StubAdminApp(tmp_path / "store", adapter_roots=[tmp_path / "roots", tmp_path / "more"])


async def test_publishing_a_new_name_is_201_and_a_taken_one_409(server: StubAdminApp) -> None:
    assert (await server.upload()).status_code == 201
    assert refusal(await server.upload())[0] == 409
    assert [operation.replace for operation in server.engine.operations if isinstance(operation, Publish)] == [0, 0]


@pytest.mark.parametrize("name", [None, "poet"])
async def test_put_publishes_the_first_version_and_the_next(server: StubAdminApp, name: str | None) -> None:
    for versions in (1, 2):
        answer = await server.upload(name=name, path="/v1/adapters/poet")
        assert answer.status_code == 201
        info = msgspec.convert(answer.json(), AdapterInfo)
        assert info.name == "poet"
        assert len(info.versions) == versions


async def test_put_with_two_names_is_refused(server: StubAdminApp) -> None:
    assert refusal(await server.upload(name="other", path="/v1/adapters/poet"))[:2] == (400, "name")
    assert refusal(await server.upload(name=None, path="/v1/adapters/.poet"))[:2] == (400, "name")


async def test_adapters_are_listed_and_shown(server: StubAdminApp) -> None:
    for name in ("b", "a"):
        await server.upload(name=name)
    listed = (await server.ask("GET", "/v1/adapters")).json()
    assert listed["object"] == "list"
    assert [info["name"] for info in listed["data"]] == ["a", "b"]
    assert (await server.ask("GET", "/v1/adapters/a")).json() == listed["data"][0]
    assert refusal(await server.ask("GET", "/v1/adapters/c"))[0] == 404


async def test_adapters_are_listed_by_pages_or_all_at_once(tmp_path: Path) -> None:
    """The engine of these tests lists two at a time."""
    keys = Keys({hash_key("boss"): Caller("boss"), hash_key("odd"): Caller("odd", adapters=("a1", "a3", "a5", "a7"))})
    server = StubAdminApp(tmp_path, keys)
    names = [f"a{number}" for number in range(7)]
    server.engine.adapters = {name: AdapterInfo(name, False, []) for name in reversed(names)}

    async def listed(query: str, key: str = "boss") -> tuple[list[str], bool]:
        page = (await server.ask("GET", f"/v1/adapters{query}", key)).json()
        found = [info["name"] for info in page["data"]]
        assert (page["first_id"], page["last_id"]) == ((found[0], found[-1]) if found else (None, None))
        return found, page["has_more"]

    assert await listed("") == (names, False)
    assert await listed("", "odd") == (["a1", "a3", "a5"], False)
    for limit in (1, 2, 3, 7, 100):
        found: list[str] = []
        more = True
        while more:
            page, more = await listed(f"?limit={limit}&after={found[-1] if found else ''}")
            assert len(page) == limit or not more
            found += page
        assert found == names
    assert await listed("?limit=2&after=a1", "odd") == (["a3", "a5"], False)
    assert await listed("?limit=2&after=a", "odd") == (["a1", "a3"], True)
    assert await listed("?after=z") == ([], False)
    for query in ("?limit=0", "?limit=1001", "?limit=x", f"?after={'x' * 65}"):
        assert (await server.ask("GET", f"/v1/adapters{query}", "boss")).status_code == 400


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_similar_names_are_told_where_there_is_no_such_adapter(server: StubAdminApp, method: str) -> None:
    await server.upload(name="customer-7")
    await server.ask("PUT", "/v1/aliases/prod", json={"targets": [{"adapter": "customer-7"}]})
    for name, hint in (
        ("custmer-7", "; did you mean customer-7?"),
        ("prod", "; it is an alias: see /v1/aliases"),
        ("x", ""),
    ):
        answer = await server.ask(method, f"/v1/adapters/{name}")
        assert refusal(answer) == (404, "adapter", f"adapter {name} does not exist{hint}")


async def test_similar_names_are_those_that_a_key_may_use(tmp_path: Path) -> None:
    server = StubAdminApp(tmp_path, Keys({hash_key("team"): Caller("team", adapters=("team-*",))}))
    server.engine.adapters = {name: AdapterInfo(name, False, []) for name in ("team-poet", "tern-poet")}
    for name, hint in (("team-pot", "; did you mean team-poet?"), ("tern-pot", ""), ("tern-poet", "")):
        answer = await server.ask("GET", f"/v1/adapters/{name}", "team")
        assert refusal(answer) == (404, "adapter", f"adapter {name} does not exist{hint}")


@pytest.mark.parametrize(
    ("method", "action", "operation"),
    [
        ("GET", "", DescribeAdapter("poet")),
        ("POST", "/load", LoadAdapter("poet")),
        ("POST", "/evict", EvictAdapter("poet")),
        ("POST", "/pin", PinAdapter("poet", True)),
        ("POST", "/unpin", PinAdapter("poet", False)),
        ("DELETE", "", DeleteAdapter("poet")),
    ],
)
async def test_each_route_calls_one_operation(
    server: StubAdminApp, method: str, action: str, operation: object
) -> None:
    await server.upload()
    answer = await server.ask(method, f"/v1/adapters/poet{action}")
    assert answer.status_code == 200
    assert server.engine.operations[1:] == [operation]
    assert answer.json() == {"name": "poet", "deleted": True} if method == "DELETE" else answer.json()["versions"]
    assert refusal(await server.ask(method, f"/v1/adapters/nobody{action}"))[0] == 404


# --- inspection ------------------------------------------------------------------------------------------------------

INSPECT = "/v1/adapters/inspect"


async def test_inspecting_an_upload_leaves_nothing_behind(server: StubAdminApp) -> None:
    files = FILES | {"tokenizer.json": b"{}"}
    answers = [
        await server.upload(files, name=None, path=INSPECT),
        await server.send([("archive", ("a.tar.gz", tar(files)))], name=None, path=INSPECT),
    ]
    for answer in answers:
        assert answer.status_code == 200
        assert msgspec.convert(answer.json(), Inspection).report == REPORT
    assert server.engine.inspected == [files, files]
    assert server.engine.adapters == {}
    assert server.leftovers == []


async def test_inspecting_takes_no_name(server: StubAdminApp) -> None:
    assert refusal(await server.upload(path=INSPECT))[:2] == (400, "name")
    assert server.engine.operations == []


async def test_inspecting_an_unsupported_adapter_is_refused(server: StubAdminApp) -> None:
    server.engine.failure = AdapterInvalid("OFT is not served: it rotates")
    assert refusal(await server.upload(name=None, path=INSPECT)) == (422, None, "OFT is not served: it rotates")
    assert server.leftovers == []


async def test_inspection_has_the_same_size_limit_as_publishing(tmp_path: Path) -> None:
    large = FILES | {"adapter_model.safetensors": bytes(3 << 20)}
    small = StubAdminApp(tmp_path, max_adapter_size=1 << 20)
    assert refusal(await small.upload(large, name=None, path=INSPECT))[0] == 413
    assert (await StubAdminApp(tmp_path, max_body=1000).upload(large, name=None, path=INSPECT)).status_code == 200


async def test_inspecting_needs_an_admin_key(tmp_path: Path) -> None:
    server = StubAdminApp(tmp_path, Keys({hash_key("sk-user"): Caller("user")}))
    assert refusal(await server.ask("POST", INSPECT))[0] == 401
    assert refusal(await server.ask("POST", INSPECT, key="sk-user"))[0] == 403


async def test_publishing_and_describing_return_the_report(server: StubAdminApp) -> None:
    assert (await server.upload()).json()["versions"][0]["report"] == REPORT
    assert (await server.ask("GET", "/v1/adapters/poet")).json()["versions"][0]["report"] == REPORT


async def test_the_schema_lists_inspection_and_its_response(server: StubAdminApp) -> None:
    paths = (await server.ask("GET", "/openapi.json")).json()["paths"]
    inspect = paths[INSPECT]["post"]
    form = inspect["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert sorted(form["properties"]) == ["archive", "files", "settings", "trust_settings"]
    for answer in (inspect["responses"]["200"], paths["/v1/adapters"]["post"]["responses"]["201"]):
        schema = answer["content"]["application/json"]["schema"]
        schema = schema["properties"].get("versions", {}).get("items", schema)
        assert {"digest", "rank", "modules", "report"} <= schema["properties"].keys()
        assert "warnings" in schema["properties"]["report"]["description"]


# --- with the command line -------------------------------------------------------------------------------------------


async def test_the_command_line_works_against_these_routes(
    server: StubAdminApp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = adapter_folder(tmp_path / "poet")
    http = uvicorn.Server(uvicorn.Config(server.app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=http.run)
    thread.start()
    try:
        while not http.started:
            await asyncio.sleep(0.01)
        url = f"--url=http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"

        async def adapter(*words: str) -> int:
            return await asyncio.to_thread(main, ["adapter", *words, url])

        assert await adapter("upload", str(source)) == 0
        assert server.engine.published == [FILES]
        assert await adapter("upload", str(source)) == 1
        assert "409: poet exists" in capsys.readouterr().err
        for words in (["upload", str(source), "--replace"], ["show", "poet"], ["load", "poet"], ["evict", "poet"]):
            assert await adapter(*words) == 0
        assert await adapter("pin", "poet") == 0
        assert server.engine.adapters["poet"].pinned
        assert await adapter("unpin", "poet") == 0
        assert not server.engine.adapters["poet"].pinned
        capsys.readouterr()
        for words in (["inspect", str(source)], ["inspect", "poet"]):
            assert await adapter(*words) == 0
            assert "another base" in capsys.readouterr().out
        assert server.engine.inspected == [FILES]
        assert await adapter("list") == 0
        assert "poet" in capsys.readouterr().out
        assert await adapter("delete", "poet") == 0
        assert server.engine.adapters == {}
    finally:
        http.should_exit = True
        await asyncio.to_thread(thread.join)
