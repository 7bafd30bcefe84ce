"""Downloads: a tar of exactly the files that were published, for admins, and none of what has been altered."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from stub_admin import FILES, StubAdminApp, refusal

from lora_serve.api.download import TarResponse
from lora_serve.api.request_record import record_of
from lora_serve.messages import AdapterFiles, AdapterInfo, AdapterVersion, LocateFiles

ALL = FILES | {"README.md": b"", "1_Pooling/config.json": b"x" * 512}
FILES_OF = "/v1/adapters/poet/files"


@pytest.fixture
def server(tmp_path: Path) -> StubAdminApp:
    server = StubAdminApp(tmp_path / "store")
    server.engine.adapters["poet"] = AdapterInfo("poet", False, [AdapterVersion("d" * 64, 5.5, 8, 2, 1, 1, [], 0)])
    folder = tmp_path / "version"
    for name, content in ALL.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in ALL.items()}
    server.engine.files = AdapterFiles("poet", "d" * 64, str(folder), files)
    return server


def unpacked(answer: httpx.Response) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        return {each.name: file.read() for each in archive if (file := archive.extractfile(each)) is not None}


async def test_the_files_come_as_they_were_published(server: StubAdminApp) -> None:
    answer = await server.ask("GET", FILES_OF)
    assert answer.status_code == 200
    assert unpacked(answer) == ALL
    assert answer.headers["Content-Type"] == "application/x-tar"
    assert answer.headers["Content-Disposition"] == f'attachment; filename="poet-{"d" * 12}.tar"'
    assert answer.headers["ETag"] == f'"{"d" * 64}"'
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    assert (await server.ask("GET", FILES_OF)).content == answer.content


async def test_a_version_can_be_asked_for(server: StubAdminApp) -> None:
    await server.ask("GET", f"{FILES_OF}?version=dd")
    await server.ask("GET", FILES_OF)
    assert server.engine.operations == [LocateFiles("poet", "dd"), LocateFiles("poet")]
    assert refusal(await server.ask("GET", f"{FILES_OF}?version="))[:2] == (400, "version")
    assert refusal(await server.ask("GET", "/v1/adapters/none/files"))[0] == 404


async def test_who_has_it_already_gets_nothing(server: StubAdminApp) -> None:
    answer = await server.ask("GET", FILES_OF, headers={"If-None-Match": f'"{"d" * 64}"'})
    assert (answer.status_code, answer.content) == (304, b"")


async def test_the_files_are_complete_though_the_version_is_deleted_meanwhile(server: StubAdminApp) -> None:
    assert server.engine.files is not None
    folder = Path(server.engine.files.folder)
    async with server.client.stream("GET", FILES_OF) as answer:
        folder.rename(folder.with_name("gone"))
        for file in sorted(folder.with_name("gone").rglob("*.json")):
            file.unlink()
        await answer.aread()
        assert unpacked(answer) == ALL


async def test_altered_files_are_not_sent_whole(server: StubAdminApp, caplog: pytest.LogCaptureFixture) -> None:
    assert server.engine.files is not None
    weights = Path(server.engine.files.folder) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    scope: dict[str, Any] = {"type": "http", "asgi": {"spec_version": "2.4"}}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await TarResponse(server.engine.files)(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
    assert sent[-1]["more_body"]  # the server closes the connection
    why = "adapter_model.safetensors of adapter poet has been altered in the store"
    assert record_of(scope).error == ("adapter_broken", None)  # a log line by itself says why
    assert why in caplog.text
    weights.write_bytes(content[:-1])
    status, field, message = refusal(await server.ask("GET", FILES_OF))
    assert (status, field) == (409, "name")
    assert message == "adapter poet cannot be downloaded: adapter_model.safetensors has another size than was published"
    weights.unlink()
    assert "No such file" in refusal(await server.ask("GET", FILES_OF))[2]
