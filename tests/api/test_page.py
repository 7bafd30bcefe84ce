"""The page and its files: what is served to whom, with which headers, and nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from stub_admin import StubAdminApp

from lora_serve.api.key_file import hash_key, load_keys
from lora_serve.api.page import bundle

WEB = Path(__file__).parent.parent.parent / "lora_serve" / "web"
MOST_BYTES = 250_000  # of the whole bundle


@pytest.fixture
def server(tmp_path: Path) -> StubAdminApp:
    return StubAdminApp(tmp_path)


@pytest.fixture
def keyed(tmp_path: Path) -> StubAdminApp:
    file = tmp_path / "keys.yaml"
    file.write_text(
        f"user: {hash_key('sk-user')}\n"
        f"boss: {{hash: '{hash_key('sk-boss')}', admin: true}}\n"
        f"poets: {{hash: '{hash_key('sk-poets')}', admin: true, adapters: ['poet*']}}\n"
    )
    return StubAdminApp(tmp_path, load_keys(file))


async def test_every_file_is_served_as_what_it_is_and_kept_for_good(server: StubAdminApp) -> None:
    kinds = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path in sorted(bundle().keys() - {"/", "/docs"}):
        answer = await server.ask("GET", path)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith(kinds.get(Path(path).suffix, "text/plain"))
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert answer.content == (WEB / path.split("/", 3)[3]).read_bytes()


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_a_document_is_asked_for_again_and_names_files_that_exist(server: StubAdminApp, path: str) -> None:
    answer = await server.ask("GET", path)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    named = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert len(named) >= 4
    assert {f"/{name}" for name in named} <= bundle().keys()
    again = await server.ask("GET", path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = await server.ask("GET", path, headers={"If-None-Match": '"another"'})
    assert other.status_code == 200


async def test_only_the_server_s_own_scripts_run_and_no_other_page_frames_it(server: StubAdminApp) -> None:
    for path in bundle():
        answer = await server.ask("GET", path)
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy.pop("default-src") == policy.pop("frame-ancestors") == "'none'"
        assert policy.pop("base-uri") == policy.pop("form-action") == "'none'"
        assert set(policy.values()) == {"'self'"}
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_the_bundle_is_small_and_names_no_other_host() -> None:
    files = bundle()
    assert sum(len(file.content) for file in files.values()) < MOST_BYTES
    for path, file in files.items():
        if not path.endswith("LICENSES.txt"):
            code = re.sub(rb"/\*.*?\*/", b"", file.content, flags=re.DOTALL)
            assert set(re.findall(rb"//([\w-]+(?:\.[\w-]+)+)", code)) <= {b"www.w3.org"}, path  # namespaces of XML


def test_scripts_and_styles_are_files_of_their_own() -> None:
    for name in ("index.html", "docs.html"):
        text = (WEB / name).read_text()
        assert not re.search(r"<script(?![^>]*src=)|<style|style=|\son\w+=", text)


def test_the_wheel_contains_every_file_of_the_bundle() -> None:
    packaged = tomllib.loads((WEB.parent.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = {path for pattern in packaged["lora_serve"] for path in WEB.parent.glob(pattern)}
    assert found >= {path for path in WEB.rglob("*") if path.is_file()}


def test_every_import_of_a_script_is_in_the_bundle() -> None:
    for path in bundle():
        if not path.endswith(".js") or "/vendor/" in path:
            continue
        for name in re.findall(r'from "(\./[^"]+)"', (WEB / path.split("/", 3)[3]).read_text()):
            assert (WEB / name).is_file(), f"{path} imports {name}"


@pytest.mark.parametrize(
    "path",
    [
        "/web/app.js",
        "/web/{}/index.html",
        "/web/{}/vendor/README.md",
        "/web/{}/../../config.py",
        "/web/{}/%2e%2e/%2e%2e/config.py",
        "/web/{}/..%2f..%2fconfig.py",
        "/web/{}/..\\..\\config.py",
        "/web/{}//etc/passwd",
        "/web/{}/app.js/",
        "/web/{}/app.js%00",
        "/web/0000000000000000/app.js",
        "/web/",
    ],
)
async def test_what_is_not_in_the_bundle_does_not_exist(server: StubAdminApp, path: str) -> None:
    folder = next(name for name in bundle() if name.endswith("/app.js")).split("/")[2]
    answer = await server.ask("GET", path.format(folder))
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("POST", 405), ("PUT", 405), ("DELETE", 405)])
async def test_files_are_read_only(server: StubAdminApp, method: str, status: int) -> None:
    for path in ("/", "/docs", next(name for name in bundle() if name.endswith("/app.js"))):
        answer = await server.ask(method, path)
        assert answer.status_code == status
        if method == "HEAD":
            assert answer.content == b""
            assert int(answer.headers["Content-Length"]) == len(bundle()[path].content)


async def test_the_page_needs_no_key_and_everything_that_it_shows_does(keyed: StubAdminApp) -> None:
    for path in bundle():
        assert (await keyed.ask("GET", path)).status_code == 200
    for path in ("/v1/key", "/v1/models", "/v1/adapters", "/metrics", "/tokenizer_info", "/openapi.json", "/web/x.js"):
        assert (await keyed.ask("GET", path)).status_code == 401, path


async def test_a_page_of_another_host_does_not_get_it_from_a_local_server(server: StubAdminApp) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        assert (await server.ask("GET", "/", headers=headers)).status_code == 403


async def test_with_keys_the_schema_is_for_those_who_have_one(keyed: StubAdminApp) -> None:
    answer = await keyed.ask("GET", "/openapi.json", key="sk-user")
    assert answer.status_code == 200
    operation = answer.json()["paths"]["/v1/adapters"]["get"]
    assert {} not in operation["security"]  # a key is not optional
    assert (await keyed.ask("GET", "/redoc", key="sk-user")).status_code == 404


@pytest.mark.parametrize(
    ("key", "admin", "metrics", "adapters"),
    [("sk-user", False, False, None), ("sk-boss", True, True, None), ("sk-poets", True, False, ["poet*"])],
)
async def test_a_key_is_told_what_it_allows(
    keyed: StubAdminApp, key: str, admin: bool, metrics: bool, adapters: list[str] | None
) -> None:
    found = (await keyed.ask("GET", "/v1/key", key=key)).json()
    assert found == {"name": key.removeprefix("sk-"), "admin": admin, "metrics": metrics, "adapters": adapters}


async def test_without_keys_everything_is_allowed(server: StubAdminApp) -> None:
    found = (await server.ask("GET", "/v1/key")).json()
    assert found == {"name": "", "admin": True, "metrics": True, "adapters": None}
