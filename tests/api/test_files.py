"""`/v1/files` as OpenAI's SDK uses it, and as hostile or unlucky clients do."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from server_process import until
from stub_admin import StubAdminApp, refusal

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key, load_keys

MOST = 1 << 20
LINE = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})
DATA = "\n".join([LINE] * 12).encode()
OLD_EXPIRY = {"anchor": "created_at", "seconds": 3600}


@pytest.fixture
def server(tmp_path: Path) -> StubAdminApp:
    callers = {"sk-a": Caller("a", admin=True), "sk-b": Caller("b", admin=True), "sk-plain": Caller("c")}
    keys = Keys({hash_key(key): caller for key, caller in callers.items()})
    return StubAdminApp(tmp_path, keys, max_file_size=MOST, max_files_size=4 * MOST)


def client(server: StubAdminApp, key: str = "sk-a") -> AsyncOpenAI:
    return AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=server.client, max_retries=0)


def left(server: StubAdminApp) -> list[str]:
    """Ids of the files on disk; asserts that nothing is staged."""
    assert server.leftovers == []
    folder = Path(str(server.config.store)) / "files"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> dict[str, Any]:
    """A request with a multipart body of (disposition, content) pairs."""
    body = b"".join(
        b"--b\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"
        for disposition, content in parts
    )
    return {"content": body + end, "headers": {"Content-Type": "multipart/form-data; boundary=b"}}


FILE = 'name="file"; filename="data.jsonl"'
PURPOSE = ('name="purpose"', b"fine-tune")


async def upload(server: StubAdminApp, *parts: tuple[str, bytes], **more: Any) -> httpx.Response:
    return await server.ask("POST", "/v1/files", "sk-a", **form(*parts, **more))


async def test_a_file_s_life_with_the_sdk(server: StubAdminApp) -> None:
    files = client(server).files
    made = await files.create(file=("dir/träin.jsonl", DATA), purpose="fine-tune", expires_after=OLD_EXPIRY)  # type: ignore[arg-type]
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(DATA), "träin.jsonl", "fine-tune")
    assert made.status == "processed"
    assert made.expires_at == made.created_at + 3600
    assert await files.retrieve(made.id) == made == await files.wait_for_processing(made.id)
    assert (await files.content(made.id)).content == DATA
    assert [each async for each in files.list()] == [made]
    deleted = await files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    assert left(server) == []
    for gone in (files.retrieve, files.content, files.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            await gone(made.id)
        assert refused.value.code == "file_not_found"


async def test_what_expired_while_the_server_was_down_goes_when_it_starts(server: StubAdminApp) -> None:
    made = await client(server).files.create(file=DATA, purpose="fine-tune", expires_after=OLD_EXPIRY)  # type: ignore[arg-type]
    record = Path(str(server.config.store)) / "files" / made.id / "file.json"
    record.write_text(record.read_text().replace(str(made.expires_at), "1"))
    again = StubAdminApp(Path(str(server.config.store)))
    async with again.app.router.lifespan_context(again.app):
        until(lambda: left(again) == [])


async def test_lists_are_pages_by_time(server: StubAdminApp) -> None:
    files = client(server).files
    ids = [(await files.create(file=DATA, purpose="fine-tune")).id for _ in range(5)]
    assert [each.id async for each in files.list(limit=2)] == ids[::-1]
    assert [each.id async for each in files.list(limit=2, order="asc")] == ids
    assert [each.id async for each in files.list(purpose="batch")] == []
    page = await files.list(limit=2, order="asc", after=ids[0])
    assert ([each.id for each in page.data], page.has_more) == (ids[1:3], True)
    assert not (await files.list(limit=2, order="asc", after=ids[2])).has_more
    async for each in files.list(limit=2):  # a page begins after a file that is no longer there
        await files.delete(each.id)
    assert left(server) == []
    for query in ("?limit=0", "?limit=10001", "?order=up", "?after=../x"):
        assert (await server.ask("GET", f"/v1/files{query}", "sk-a")).status_code == 400


async def test_a_file_is_seen_by_its_own_key_only(server: StubAdminApp) -> None:
    made = await client(server, "sk-a").files.create(file=DATA, purpose="fine-tune")
    others = client(server, "sk-b").files
    assert [each async for each in others.list()] == []
    for hidden in (others.retrieve, others.content, others.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            await hidden(made.id)
        assert refused.value.message.endswith(f"file {made.id} does not exist")
    assert (await others.list(after=made.id)).data == []
    assert left(server) == [made.id]
    for key, error in (("sk-plain", openai.PermissionDeniedError), ("sk-x", openai.AuthenticationError)):
        with pytest.raises(error):
            await client(server, key).files.create(file=DATA, purpose="fine-tune")


async def test_a_later_key_of_the_same_name_does_not_see_the_files_of_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made: list[tuple[str, str]] = []
    for number, key in enumerate(("sk-old", "sk-new", "sk-old")):
        file.write_text(f"a: {{hash: '{hash_key(key)}', admin: true, share: {number + 1}}}\n")
        files = client(StubAdminApp(tmp_path, load_keys(file)), key).files
        assert [each.id async for each in files.list()] == [id_ for id_, owner in made if owner == key]
        made.append(((await files.create(file=DATA, purpose="fine-tune")).id, key))


async def test_invalid_data_is_refused_with_line_numbers_and_not_kept(server: StubAdminApp) -> None:
    data = DATA + b'\n{"messages": []}\nnot json\n'
    with pytest.raises(openai.BadRequestError) as refused:
        await client(server).files.create(file=data, purpose="fine-tune")
    assert (refused.value.code, refused.value.param) == ("invalid_training_file", "file")
    assert "line 13: messages: List should have at least 1 item" in refused.value.message
    assert "line 14: the line is not valid JSON" in refused.value.message
    assert left(server) == []


async def test_what_is_uploaded_and_how_it_went_is_logged_without_content(
    server: StubAdminApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = await client(server).files.create(file=DATA, purpose="fine-tune")
    with pytest.raises(openai.BadRequestError):
        await client(server).files.create(file=b'{"messages": "secret"}', purpose="fine-tune")
    await client(server).files.delete(made.id)
    audit = [each.getMessage() for each in caplog.records if each.name == "lora_serve.audit"]
    assert audit == [f"upload-file {made.id}", f"delete-file {made.id}"]
    assert not any(word in str(each.__dict__) for each in caplog.records for word in ("secret", "hello"))


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([(FILE, DATA)], "purpose"),
        ([PURPOSE], "file"),
        ([PURPOSE, ('name="file"', DATA)], "file"),
        ([PURPOSE, (FILE, DATA), (FILE, DATA)], "file"),
        ([PURPOSE, PURPOSE, (FILE, DATA)], "purpose"),
        ([('name="purpose"', b"batch"), (FILE, DATA)], "purpose"),
        ([(FILE, DATA), ('name="purpose"', b"fine-tune-results")], "purpose"),
        ([PURPOSE, ('name="mood"', b"x"), (FILE, DATA)], "mood"),
        ([PURPOSE, ('name="expires_after[seconds]"', b"3600"), (FILE, DATA)], "expires_after[anchor]"),
        (
            [PURPOSE, ('name="expires_after[anchor]"', b"created_at"), (FILE, DATA)],
            "expires_after[seconds]",
        ),
        *(
            (
                [
                    PURPOSE,
                    ('name="expires_after[anchor]"', b"created_at"),
                    ('name="expires_after[seconds]"', seconds),
                    (FILE, DATA),
                ],
                "expires_after[seconds]",
            )
            for seconds in (b"3599", b"2592001", b"1e4", b"-3600", b"9" * 4000, b"")
        ),
        ([('name="purpose"', b"x" * 5000), (FILE, DATA)], "purpose"),
    ],
)
async def test_a_wrong_form_is_400_and_names_the_field(
    server: StubAdminApp, parts: list[tuple[str, bytes]], param: str
) -> None:
    assert refusal(await upload(server, *parts))[:2] == (400, param)
    assert left(server) == []


async def test_the_order_of_the_parts_does_not_matter(server: StubAdminApp) -> None:
    assert (await upload(server, (FILE, DATA), PURPOSE)).status_code == 200
    assert len(left(server)) == 1


async def test_a_form_that_breaks_off_leaves_nothing(server: StubAdminApp) -> None:
    assert refusal(await upload(server, PURPOSE, (FILE, DATA), end=b""))[0] == 400
    assert left(server) == []


async def test_a_file_over_the_limit_is_413_and_not_read_further(server: StubAdminApp) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield form(PURPOSE, (FILE, b""), end=b"")["content"].removesuffix(b"\r\n")
        while sent < 100 * MOST:
            piece = f"{LINE}\n".encode() * 500
            sent += len(piece)
            yield piece

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = await server.ask("POST", "/v1/files", "sk-a", content=endless(), headers=kind)
    assert refusal(answer)[0] == 413
    assert sent < 5 * MOST
    assert left(server) == []
    line = f"{LINE}\n".encode()
    with pytest.raises(openai.APIStatusError, match="larger than 1,048,576 bytes"):
        await client(server).files.create(file=line * (MOST // len(line) + 1), purpose="fine-tune")
    assert left(server) == []


async def test_the_quota_of_a_key_is_413_and_leaves_other_keys_alone(server: StubAdminApp) -> None:
    data = f"{LINE}\n".encode() * (MOST // (len(LINE) + 1))
    for _ in range(4):
        await client(server).files.create(file=data, purpose="fine-tune")
    with pytest.raises(openai.APIStatusError) as refused:
        await client(server).files.create(file=data, purpose="fine-tune")
    assert refused.value.status_code == 413
    assert len(left(server)) == 4
    await client(server, "sk-b").files.create(file=data, purpose="fine-tune")


async def test_a_full_disk_is_507_and_leaves_nothing(server: StubAdminApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Disk, path: Path, *data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for operation in ("sync", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(Disk, operation, full)
            with pytest.raises(openai.InternalServerError) as refused:
                await client(server).files.create(file=DATA, purpose="fine-tune")
        assert (refused.value.status_code, refused.value.code) == (507, "storage_full")
        assert left(server) == []
    await client(server).files.create(file=DATA, purpose="fine-tune")


async def test_a_damaged_file_is_an_error_and_its_content_is_not_sent(server: StubAdminApp) -> None:
    files = client(server).files
    made = await files.create(file=DATA, purpose="fine-tune")
    content = Path(str(server.config.store)) / "files" / made.id / "content"
    content.write_bytes(DATA[:-1])
    shown = await files.retrieve(made.id)
    assert shown.status == "error"
    assert "damaged" in str(shown.status_details)
    with pytest.raises(openai.ConflictError) as refused:
        await files.content(made.id)
    assert refused.value.code == "file_damaged"
    await files.delete(made.id)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("a%22b%0D%0Ac.jsonl", 'a"b__c.jsonl'),
        ("100%25 %2F %7e.jsonl", "100%25 %2F %7e.jsonl"),
        ('a\\"b.jsonl', 'a"b.jsonl'),
        ("../%22/b.jsonl", "b.jsonl"),
    ],
)
async def test_a_file_s_name_is_decoded_as_forms_encode_it(server: StubAdminApp, sent: str, kept: str) -> None:
    answer = await upload(server, PURPOSE, (f'name="file"; filename="{sent}"', DATA))
    assert answer.json()["filename"] == kept


async def test_content_is_downloaded_and_never_shown_as_a_page(server: StubAdminApp) -> None:
    made = await client(server).files.create(file=('a"; x=y\r\n<b>.html', DATA), purpose="fine-tune")
    answer = await server.ask("GET", f"/v1/files/{made.id}/content", "sk-a")
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert made.filename == 'a"; x=y__<b>.html'
    assert answer.headers["Content-Disposition"] == f"attachment; filename*=UTF-8''{quote(made.filename)}"
    head = await server.ask("HEAD", f"/v1/files/{made.id}/content", "sk-a")
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(len(DATA)))
