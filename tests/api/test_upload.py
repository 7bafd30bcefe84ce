"""Uploads: accepted and refused forms and archives, and nothing left in staging."""

from __future__ import annotations

import errno
import gzip
import io
import struct
import tarfile
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message
from stub_admin import CONFIG, FILES, WEIGHTS, StubAdminApp, packed_zip, refusal, tar

from lora_serve.adapters.archive import unpack
from lora_serve.adapters.store.store import Store
from lora_serve.api.upload import staging_folder
from lora_serve.errors import AdapterInvalid
from lora_serve.messages import Inspect, Publish

MOST = 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> StubAdminApp:
    return StubAdminApp(tmp_path, max_adapter_size=MOST)


def archive(content: bytes, name: str = "a.tar.gz") -> list[tuple[str, Any]]:
    return [("archive", (name, content))]


# --- what is taken ---------------------------------------------------------------------------------------------------


async def test_single_files_are_published_and_staging_is_empty_afterwards(server: StubAdminApp) -> None:
    answer = await server.upload(FILES | {"README.md": b"words"})
    assert answer.status_code == 201
    assert answer.json()["versions"][0]["digest"] == "digest0"
    assert server.engine.published == [FILES | {"README.md": b"words"}]
    assert server.leftovers == []


@pytest.mark.parametrize("top", ["", "./", "poet/", "./poet/"])
@pytest.mark.parametrize("mode", ["w:gz", "w:"])
async def test_a_tar_of_the_files_or_of_their_folder_is_accepted(server: StubAdminApp, top: str, mode: str) -> None:
    packed = tar({top + name: content for name, content in FILES.items()}, mode)
    assert (await server.send(archive(packed))).status_code == 201
    assert server.engine.published == [FILES]
    assert server.leftovers == []


@pytest.mark.parametrize("top", ["", "poet/"])
async def test_a_zip_is_accepted(server: StubAdminApp, top: str) -> None:
    packed = packed_zip({top + name: content for name, content in FILES.items()})
    assert (await server.send(archive(packed, "a.zip"))).status_code == 201
    assert server.engine.published == [FILES]


async def test_other_files_are_left_out(server: StubAdminApp) -> None:
    beside = dict.fromkeys(
        [
            "tokenizer_config.json",
            "added_tokens.json",
            "special_tokens_map.json",
            "modeling_custom.py",
            "adapter_model.bin",
            "latest",
            "optimizer.pt",
            "tokenizer.model",
            "chat_template.jinja",
            ".gitattributes",
            "training_args.bin",
            "._adapter_config.json",
        ],
        b"x",
    )
    await server.upload(FILES | beside)
    await server.send(archive(tar(FILES | beside | {"__MACOSX/a/b/._x": b""})), "two")
    await server.send(archive(packed_zip(FILES | beside)), "three")
    assert server.engine.published == [FILES] * 3


# Beside its adapter: logs, DeepSpeed's state, pickles, a link, earlier checkpoints of the same adapter.
TRAINER_OUTPUT = {
    "runs/Nov27_host/events.out.tfevents.1700000000.host.1.0": b"x" * 1000,
    "zero_to_fp32.py": b"import os",
    "latest": b"global_step80",
    "global_step80/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": b"x",
    "rng_state_0.pth": b"x",
    "trainer_state.json": b"{}",
    **{f"wandb/run-1/files/media/{n}.png": b"x" for n in range(100)},
}


@pytest.mark.parametrize("pack", [tar, packed_zip])
async def test_a_trainer_s_output_is_served_without_its_other_files(server: StubAdminApp, pack: Any) -> None:
    earlier = {f"checkpoint-40/{name}": b"earlier" for name in FILES}
    for top in ("", "out/"):
        packed = pack({top + name: content for name, content in (FILES | earlier | TRAINER_OUTPUT).items()})
        assert (await server.send(archive(packed), f"a{len(top)}")).status_code == 201
    assert server.engine.published == [FILES] * 2


@pytest.mark.parametrize("pack", [tar, packed_zip])
async def test_an_adapter_that_is_only_in_a_checkpoint_is_found_there(server: StubAdminApp, pack: Any) -> None:
    inside = {f"out/checkpoint-80/{name}": content for name, content in FILES.items()}
    assert (await server.send(archive(pack(inside | {"out/trainer_state.json": b"{}"})))).status_code == 201
    assert server.engine.published == [FILES]
    another = {f"out/checkpoint-40/{name}": content for name, content in FILES.items()}
    status, _, said = refusal(await server.send(archive(pack(inside | another)), "other"))
    assert status == 422
    assert "2 adapters, in out/checkpoint-40, out/checkpoint-80: give one of these folders" in said


async def test_links_beside_the_adapter_are_left_alone(server: StubAdminApp) -> None:
    packed = tar(FILES | {"last": member(tarfile.SYMTYPE, "last", "/etc")})
    assert (await server.send(archive(packed))).status_code == 201
    assert server.engine.published == [FILES]


async def test_a_tokenizer_is_kept_for_comparison(server: StubAdminApp) -> None:
    files = FILES | {"tokenizer.json": b"{}"}
    await server.upload(files, "one")
    await server.send(archive(tar(files)), "two")
    await server.send(archive(packed_zip(files), "a.zip"), "three")
    assert server.engine.published == [files] * 3


async def test_the_pooling_of_an_adapter_for_embeddings_is_kept(server: StubAdminApp) -> None:
    """Beside it, sentence-transformers saves folders of other modules, which `modules.json` names."""
    files = FILES | {"modules.json": b"[]", "1_Pooling/config.json": b"{}"}
    beside = {"2_Normalize/config.json": b"{}", "3_Dense/config.json": b"{}", "3_Dense/model.safetensors": b"x"}
    await server.upload(files | beside, "one")
    await server.send(archive(tar(files | beside)), "two")
    await server.send(archive(packed_zip({f"top/{name}": each for name, each in (files | beside).items()})), "three")
    assert server.engine.published == [files] * 3
    assert server.leftovers == []


async def test_a_form_can_arrive_in_chunks_of_any_size(server: StubAdminApp) -> None:
    whole = server.client.build_request("POST", "/v1/adapters", data={"name": "poet"}, files=form(FILES))
    body = whole.read()
    for size in (1, 7, 1000):

        async def pieces(size: int = size) -> AsyncIterator[bytes]:
            for at in range(0, len(body), size):
                yield body[at : at + size]

        headers = {"Content-Type": whole.headers["Content-Type"]}
        answer = await server.ask("POST", "/v1/adapters", content=pieces(), headers=headers)
        assert answer.status_code == 201
        server.engine.adapters.clear()
    assert server.engine.published == [FILES] * 3


def form(files: dict[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (name, content)) for name, content in files.items()]


# --- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "a" * 65, "ü", "a\n", "-x", "a@b"])
async def test_invalid_names_are_refused(server: StubAdminApp, name: str) -> None:
    assert refusal(await server.upload(name=name))[:2] == (400, "name")
    assert server.engine.operations == []


@pytest.mark.parametrize(
    ("parts", "name", "param", "message"),
    [
        (form(FILES), None, "name", "missing parameter: name"),
        ([("files", None)], "poet", "files", "needs a file name"),
        (form({"adapter_config.json": CONFIG}), "poet", "files", "adapter_model.safetensors is missing"),
        (form({"adapter_model.safetensors": WEIGHTS}), "poet", "files", "adapter_config.json is missing"),
        ([*form(FILES), *form(FILES)], "poet", "files", "sent twice"),
        ([*form(FILES), *archive(b"")], "poet", "archive", "not both"),
        ([*archive(b""), *archive(b"")], "poet", "archive", "one archive"),
        ([*form(FILES), ("color", (None, b"red"))], "poet", "color", "unknown parameter: color"),
        ([*form(FILES), ("name", (None, b"other"))], "poet", "name", "sent twice"),
        (form({f"{number}.txt": b"" for number in range(65)}), "poet", "files", "more than 64"),
    ],
)
async def test_an_invalid_form_is_refused_naming_the_field(
    server: StubAdminApp, parts: list[tuple[str, Any]], name: str | None, param: str, message: str
) -> None:
    parts = [(field, (None, b"x") if part is None else part) for field, part in parts]
    answer = refusal(await server.send(parts, name))
    assert answer[:2] == (400, param)
    assert message in answer[2]
    assert server.leftovers == []


async def test_a_form_without_files_is_refused(server: StubAdminApp) -> None:
    assert refusal(await server.send([]))[:2] == (400, "files")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{}", "application/json"),
        (b"", "multipart/form-data"),
        (b"junk", "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\npoe', "multipart/form-data; boundary=b"),
        (b"--b\r\n" + b"X" * 10_000, "multipart/form-data; boundary=b"),
        (b"--" + b"b" * 10_000, "multipart/form-data; boundary=" + "b" * 10_000),
    ],
)
async def test_an_incomplete_form_is_400(server: StubAdminApp, content: bytes, kind: str) -> None:
    answer = await server.ask("POST", "/v1/adapters", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert server.leftovers == []


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.bin", "save the adapter as adapter_model.safetensors"),
        ("weights.PT", "would run code when read"),
        ("model.pkl", "would run code when read"),
        ("model.safetensors", "which PEFT would not read either"),
        ("notes.txt", "adapter_model.safetensors is missing"),
    ],
)
async def test_what_is_there_instead_of_the_weights_is_named(server: StubAdminApp, name: str, message: str) -> None:
    files = {"adapter_config.json": CONFIG, name: b"x"}
    for answer, status in (
        (await server.upload(files), 400),
        (await server.send(archive(tar(files))), 422),
        (await server.send(archive(packed_zip(files))), 422),
    ):
        assert refusal(answer)[0] == status
        assert message in refusal(answer)[2]
        assert name in refusal(answer)[2] or name == "notes.txt"
    assert server.leftovers == []


async def test_a_path_in_a_file_name_cannot_escape_staging(server: StubAdminApp, tmp_path: Path) -> None:
    parts = [("files", (f"../../{name}", content)) for name, content in FILES.items()]
    assert (await server.send(parts)).status_code == 201
    assert server.engine.published == [FILES]
    assert [path.name for path in tmp_path.iterdir()] == ["staging"]


async def test_an_upload_goes_on_when_a_restarted_engine_opens_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    async with staging_folder(store.staging) as folder:
        store.close()
        Store(tmp_path).close()
        assert folder.is_dir()
    assert not folder.exists()
    (tmp_path / "staging" / folder.name).mkdir()  # of an API process that was killed
    Store(tmp_path).close()
    assert not folder.exists()


# --- sizes -----------------------------------------------------------------------------------------------------------


async def test_an_upload_over_the_size_limit_is_413_and_not_read_further(server: StubAdminApp) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
        while sent < 100 * MOST:
            sent += 1 << 16
            yield b"\0" * (1 << 16)

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    assert refusal(await server.ask("POST", "/v1/adapters", content=endless(), headers=kind))[0] == 413
    assert sent < 5 * MOST
    assert server.leftovers == []


async def test_a_content_length_over_the_limit_is_413_at_once(server: StubAdminApp) -> None:
    assert refusal(await server.upload(FILES | {"adapter_model.safetensors": b"\0" * (3 * MOST)}))[0] == 413


@pytest.mark.parametrize("pack", [tar, packed_zip])
async def test_an_archive_that_unpacks_beyond_the_limit_is_413(server: StubAdminApp, pack: Any) -> None:
    packed = pack(FILES | {"adapter_model.safetensors": b"\0" * (3 * MOST)})
    assert len(packed) < MOST
    assert refusal(await server.send(archive(packed)))[0] == 413
    assert server.leftovers == []


@pytest.mark.parametrize("pack", [tar, packed_zip])
async def test_an_archive_bomb_below_the_limit_is_detected_by_its_ratio(tmp_path: Path, pack: Any) -> None:
    server = StubAdminApp(tmp_path)
    packed = pack(FILES | {"adapter_model.safetensors": bytes(20 << 20)})
    status, _, message = refusal(await server.send(archive(packed)))
    assert status == 422
    assert "100 times" in message


async def test_a_full_disk_is_507(server: StubAdminApp) -> None:
    server.engine.failure = OSError(errno.ENOSPC, "No space left on device", "/secret/path")
    answer = await server.upload()
    assert refusal(answer)[0] == 507
    assert "secret" not in answer.text
    assert server.leftovers == []


# --- hostile archives ------------------------------------------------------------------------------------------------


def member(kind: bytes, name: str = "adapter_model.safetensors", link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def bomb_in_a_header() -> bytes:
    """A tar whose extended header claims to be, and is, 64 MB long."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 64 << 20
    return gzip.compress(header.tobuf() + bytes(64 << 20), 1)


def skip_without_end() -> bytes:
    """A tar whose first member, which nobody wants, claims 4 TB."""
    header = tarfile.TarInfo("notes.txt")
    header.size = 4 << 40
    return gzip.compress(header.tobuf() + bytes(64 << 20), 1)


def zip_with_a_link() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        link = zipfile.ZipInfo("adapter_config.json")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
        file.writestr("adapter_model.safetensors", WEIGHTS)
    return packed.getvalue()


def zip_whose_directory_is_elsewhere(by: int) -> bytes:
    packed = bytearray(packed_zip(FILES))
    (offset,) = struct.unpack("<L", packed[-6:-2])
    packed[-6:-2] = struct.pack("<L", offset + by)
    return bytes(packed)


def zip_with_a_nameless_file() -> bytes:
    packed = packed_zip(FILES | {"x": b""})
    return packed.replace(b"x", b"\0")


def zip_whose_file_is_elsewhere() -> bytes:
    packed = bytearray(packed_zip(FILES))
    at = packed.index(b"PK\x01\x02")
    packed[at + 42 : at + 46] = struct.pack("<L", 7)
    return bytes(packed)


def zip_with_a_long_directory() -> bytes:
    packed = bytearray(packed_zip(FILES))
    packed[-10:-6] = struct.pack("<L", 1 << 30)
    return bytes(packed)


def zip_that_understates_its_sizes() -> bytes:
    packed = packed_zip(FILES | {"adapter_model.safetensors": bytes(20 << 20)})
    return packed.replace(struct.pack("<L", 20 << 20), struct.pack("<L", 1000))


def tar_with_a_negative_size() -> bytes:
    header = bytearray(tar({"adapter_config.json": b"x"}, "w:"))
    header[124:136] = b"\xff" * 12  # -1 in base 256
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * ord(" ") + sum(header[156:512]))
    return bytes(header)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (tar({"/adapter_config.json": b"x"}), "leads out"),
        (tar({"../adapter_config.json": b"x"}), "leads out"),
        (tar({"a/../../adapter_config.json": b"x"}), "leads out"),
        (tar({"a\\..\\adapter_config.json": b"x"}), "leads out"),
        (packed_zip({"../adapter_config.json": b"x"}), "leads out"),
        (packed_zip({"C:/adapter_config.json": b"x"}), "leads out"),
        (tar({"a/b/adapter_config.json": b"x"}), "adapter_model.safetensors is missing in a/b"),
        (tar({"a/adapter_config.json": b"x", "b/adapter_model.safetensors": b"x"}), "safetensors is missing in a"),
        (tar({"a/adapter_config.json": b"x", "adapter_config.json": b"x"}), "adapter_model.safetensors is missing"),
        (tar(FILES | {"./adapter_config.json": b"x"}), "two files"),
        (tar(FILES | {"1_Pooling/config.json": b"x", "./1_Pooling/config.json": b"x"}), "two files"),
        (tar(FILES | {"../1_Pooling/config.json": b"x"}), "leads out"),
        (tar(FILES | {"1_Pooling/config.json": member(tarfile.SYMTYPE, "1_Pooling/config.json", "/etc/x")}), "links"),
        (tar({"adapter_config.json": CONFIG, "link": member(tarfile.SYMTYPE, link="/etc/passwd")}), "links"),
        (tar({"adapter_config.json": CONFIG, "link": member(tarfile.LNKTYPE, link="adapter_config.json")}), "links"),
        (tar({"adapter_config.json": CONFIG, "device": member(tarfile.CHRTYPE)}), "links"),
        (tar({"adapter_config.json": CONFIG, "pipe": member(tarfile.FIFOTYPE)}), "links"),
        (tar({"adapter_config.json": CONFIG, "sparse": member(tarfile.GNUTYPE_SPARSE)}), "links"),
        (zip_with_a_link(), "links"),
        (tar({f"{number}.txt": b"" for number in range(1001)}), "more than 1000"),
        (packed_zip({f"{number}.txt": b"" for number in range(1001)}), "more than 1000"),
        (zip_with_a_long_directory(), "more than 1000"),
        (zip_whose_directory_is_elsewhere(1 << 20), "directory is not where its end says"),
        (zip_whose_directory_is_elsewhere(1), "directory is not where its end says"),
        (zip_whose_file_is_elsewhere(), "cannot be read"),
        (zip_with_a_nameless_file(), "cannot be read"),
        (bomb_in_a_header(), "header that is too long"),
        (zip_that_understates_its_sizes(), "cannot be read"),
        (tar_with_a_negative_size(), "cannot be read"),
        (b"", "cannot be read"),
        (b"nothing of the kind", "cannot be read"),
        (b"PK\x03\x04 but no more", "cannot be read"),
        (packed_zip(FILES) + b"comment", "cannot be read"),
        (tar(FILES)[:200], "cannot be read"),
        (b"\x1f\x8b" + b"\0" * 100, "cannot be read"),
    ],
)
async def test_hostile_archives_are_refused_and_leave_nothing_behind(
    tmp_path: Path, packed: bytes, message: str
) -> None:
    server = StubAdminApp(tmp_path / "store")
    status, _, said = refusal(await server.send(archive(packed)))
    assert status == 422
    assert message in said
    assert server.engine.published == []
    assert server.leftovers == []
    assert [path.name for path in tmp_path.rglob("*")] == ["store", "staging"]


@pytest.mark.parametrize(
    ("packed", "name"),
    [
        (tar({"../adapter_config.json": b"x"}), "../adapter_config.json"),
        (packed_zip({"/etc/passwd": b"x"}), "/etc/passwd"),
        (tar(FILES | {"README.md": member(tarfile.SYMTYPE, "README.md", "/etc/passwd")}), "README.md"),
        (tar(FILES | {"README.md": member(tarfile.FIFOTYPE, "README.md")}), "README.md"),
        (zip_with_a_link(), "adapter_config.json"),
        (tar({"a/b/adapter_config.json": b"x"}), "a/b"),
    ],
)
async def test_an_error_names_the_member_and_no_path_on_the_server(
    server: StubAdminApp, tmp_path: Path, packed: bytes, name: str
) -> None:
    message = refusal(await server.send(archive(packed)))[2]
    assert name in message
    assert str(tmp_path) not in message


def test_extracted_files_get_the_servers_permissions_and_times(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, content in FILES.items():
            odd = member(tarfile.REGTYPE, name)
            odd.size, odd.mode, odd.mtime = len(content), 0o7777, 1 << 70
            file.addfile(odd, io.BytesIO(content))
    (tmp_path / "new").touch()
    unpack(tmp_path / "a.tar", tmp_path, MOST)
    for name, content in FILES.items():
        assert (tmp_path / name).read_bytes() == content
        assert (tmp_path / name).stat().st_mode == (tmp_path / "new").stat().st_mode
        assert abs((tmp_path / name).stat().st_mtime - time.time()) < 60


async def test_a_skipped_member_is_not_read_beyond_the_limit(server: StubAdminApp) -> None:
    assert refusal(await server.send(archive(skip_without_end())))[0] == 413


async def test_an_encrypted_or_exotic_zip_is_refused(server: StubAdminApp) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("adapter_config.json", CONFIG)
    encrypted = bytearray(packed_zip(FILES))
    encrypted[encrypted.rindex(b"PK\x01\x02", 0, encrypted.rindex(b"PK\x01\x02")) + 8] |= 1
    for content in (packed.getvalue(), bytes(encrypted)):
        assert refusal(await server.send(archive(content)))[0] == 422


# --- leaving ---------------------------------------------------------------------------------------------------------


async def test_a_client_that_disconnects_leaves_nothing_behind(server: StubAdminApp) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
    messages: list[Message] = [
        {"type": "http.request", "body": head + bytes(MOST), "more_body": True},
        {"type": "http.disconnect"},
    ]
    found: list[int] = []

    async def receive() -> Message:
        if len(messages) == 1:
            found.append(len(server.leftovers))
        return messages.pop(0)

    async def send(message: Message) -> None:
        pass

    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    scope = {"type": "http", "method": "POST", "path": "/v1/adapters", "headers": headers, "query_string": b""}
    await server.app(scope, receive, send)
    assert found == [1]
    assert server.leftovers == []
    assert server.engine.operations == []


async def test_an_upload_refused_by_the_engine_leaves_nothing_behind(server: StubAdminApp) -> None:
    server.engine.failure = AdapterInvalid("unknown module q_prok")
    assert refusal(await server.upload()) == (422, None, "unknown module q_prok")
    assert len(server.engine.published) == 1
    assert server.leftovers == []


# --- settings --------------------------------------------------------------------------------------------------------

SETTINGS = b"temperature: 0.5\n"
TRUST = ("trust_settings", (None, b"true"))


def trusted(server: StubAdminApp) -> bool:
    operation = server.engine.operations[-1]
    assert isinstance(operation, Publish | Inspect)
    return operation.trust_settings


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/adapters/poet", "/v1/adapters/inspect"])
async def test_settings_count_only_if_the_request_says_so(server: StubAdminApp, path: str) -> None:
    name = None if path.endswith("inspect") else "poet"
    for said, expected in ((None, False), (b"false", False), (b"true", True)):
        server.engine.adapters.clear()
        fields = [] if said is None else [("trust_settings", (None, said))]
        files = [("files", (file, content)) for file, content in (FILES | {"serve.yaml": SETTINGS}).items()]
        answer = await server.send([*files, *fields], name, path)
        assert answer.is_success, answer.text
        assert trusted(server) is expected
    assert [*server.engine.published, *server.engine.inspected] == [FILES | {"serve.yaml": SETTINGS}] * 3


async def test_settings_in_the_form_replace_the_adapter_s_own(server: StubAdminApp) -> None:
    packed = tar(FILES | {"serve.yaml": b"temperature: 2\n"})
    for part in ((None, SETTINGS), ("serve.yaml", SETTINGS)):  # as a field, or as a file
        server.engine.adapters.clear()
        assert (await server.send([*archive(packed), ("settings", part)])).status_code == 201
        assert trusted(server)
    assert server.engine.published == [FILES | {"serve.yaml": SETTINGS}] * 2


@pytest.mark.parametrize(
    ("parts", "status", "param"),
    [
        ([("trust_settings", (None, b"yes"))], 400, "trust_settings"),
        ([("trust_settings", (None, b"true"))] * 2, 400, "trust_settings"),
        ([("settings", (None, b"x" * 200_000))], 400, "settings"),
        ([("settings", (None, b"temprature: 1"))], 422, "settings"),
        ([("archive", ("a.zip", packed_zip(FILES | {"serve.yaml": b"#" * 200_000}))), TRUST], 422, "settings"),
        ([("settings", (None, b"system: be brief"))], 422, "settings"),  # this base has no chat template
        ([("settings", (None, b"stop_tokens: [<|end|>]"))], 422, "settings"),
    ],
)
async def test_settings_that_cannot_be_are_refused_before_anything_is_published(
    server: StubAdminApp, parts: list[tuple[str, Any]], status: int, param: str
) -> None:
    tokenizer = server.app.state.services.tokenizer
    tokenizer.convert_tokens_to_ids = lambda name: None
    packed = [] if parts[0][0] == "archive" else archive(tar(FILES))
    answer = await server.send([*packed, *parts])
    assert refusal(answer)[:2] == (status, param)
    assert (server.engine.published, server.leftovers) == ([], [])
