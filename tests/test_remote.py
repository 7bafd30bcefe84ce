"""`lora-serve adapter …` against a small HTTP server that records the requests."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lora_serve.cli import main

REPORT = {
    "method": "LoRA",
    "features": ["use_rslora", "bias"],
    "ranks": [4, 8],
    "modules": "2 of 7",
    "touched": {"linear": "2 of 7", "embedding": "1 of 1"},
    "lowered": ["2 low-rank updates", "1 modules with a constant added"],
    "composable": False,
    "not_composable": "it replaces parts of the base",
    "base_model_name_or_path": "some/base\x1b[31m",
    "warnings": ["it was trained on some/base", "its tokenizer differs"],
}
VERSION = {
    "digest": "0123456789abcdef",
    "rank": 8,
    "file_bytes": 1_200_000,
    "memory_bytes": 2_500_000,
    "tiers": ["disk", "host"],
    "leases": 1,
    "report": REPORT,
}
ADAPTER = {"name": "poet", "pinned": True, "versions": [VERSION]}
ROW = ["poet", "0123456789ab", "8", "2.5 MB", "disk, host", "1", "yes"]
SHOWN = [
    ["method", "LoRA (use_rslora, bias)"],
    ["ranks", "4, 8"],
    ["changes", "2 of 7 linear, 1 of 1 embedding"],
    ["size", "1.2 MB on disk, 2.5 MB in memory"],
    ["became", "2 low-rank updates"],
    ["1 modules with a constant added"],
    ["composable", "no: it replaces parts of the base"],
    ["trained on", "some/base?[31m"],
    ["warning", "it was trained on some/base"],
    ["warning", "its tokenizer differs"],
]


class Handler(BaseHTTPRequestHandler):
    server: RecordingServer

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, self.headers, body))
        status, content = self.server.answer
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


class RecordingServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, Message, bytes]] = []
        self.answer: tuple[int, object] = (200, ADAPTER)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    with RecordingServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "poet"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b'{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) + b"\r\n--")
    (folder / "notes.txt").write_text("not for the server")
    return folder


def parts(headers: Message, body: bytes) -> list[tuple[str, str | None, bytes]]:
    """(field, file name, content) of a multipart form, as another library reads it."""
    form = email.message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
    found = []
    for part in form.get_payload():
        assert isinstance(part, Message)
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        found.append((str(part.get_param("name", header="content-disposition")), part.get_filename(), content))
    return found


def test_upload_sends_the_adapters_files_under_the_folders_name(server: RecordingServer, folder: Path) -> None:
    assert main(["adapter", "upload", str(folder), "--url", server.url, "--api-key", "sk-1"]) == 0
    ((method, path, headers, body),) = server.asked
    assert (method, path, headers["Authorization"]) == ("POST", "/v1/adapters", "Bearer sk-1")
    assert parts(headers, body) == [
        ("name", None, b"poet"),
        ("files", "adapter_config.json", b'{"r": 8}'),
        ("files", "adapter_model.safetensors", bytes(range(256)) + b"\r\n--"),
    ]


def test_upload_sends_an_archive_unchanged_and_can_replace(server: RecordingServer, tmp_path: Path) -> None:
    archive = tmp_path / "bard.tar.gz"
    archive.write_bytes(b"packed")
    assert main(["adapter", "upload", str(archive), "--replace", "--url", server.url]) == 0
    ((method, path, headers, body),) = server.asked
    assert (method, path) == ("PUT", "/v1/adapters/bard")
    assert parts(headers, body) == [("name", None, b"bard"), ("archive", "bard.tar.gz", b"packed")]


def test_upload_includes_the_tokenizer(server: RecordingServer, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert main(["adapter", "upload", str(folder), "--url", server.url]) == 0
    assert parts(*server.asked[0][2:])[-1] == ("files", "tokenizer.json", b"{}")


def test_upload_includes_the_pooling_of_an_adapter_for_embeddings(server: RecordingServer, folder: Path) -> None:
    (folder / "modules.json").write_bytes(b"[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_bytes(b"{}")
    assert main(["adapter", "upload", str(folder), "--url", server.url]) == 0
    sent = parts(*server.asked[0][2:])
    assert sent[-2:] == [("files", "modules.json", b"[]"), ("files", "1_Pooling/config.json", b"{}")]


PEAK = """
import re, sys
from lora_serve.cli import main

assert main(sys.argv[1:]) == 0
print(re.search("VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["upload", "inspect"])
def test_settings_are_sent_and_count_if_that_is_said(server: RecordingServer, folder: Path, command: str) -> None:
    (folder / "serve.yaml").write_text("top_k: 1\n")
    for flags in ([], ["--trust-settings"]):
        main(["adapter", command, str(folder), *flags, "--url", server.url])
        sent = parts(*server.asked[-1][2:])
        assert ("files", "serve.yaml", b"top_k: 1\n") in sent
        assert (("trust_settings", None, b"true") in sent) is bool(flags)


def test_upload_streams_files_that_need_not_fit_into_memory(server: RecordingServer, folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(128 << 20)
    asked = [sys.executable, "-c", PEAK, "adapter", "upload", str(folder), "--url", server.url]
    peak = int(subprocess.run(asked, check=True, capture_output=True, text=True).stderr)  # KiB
    assert len(server.asked[0][3]) > 128 << 20
    assert peak < 100 << 10


def test_upload_prints_a_summary_of_what_was_published(
    server: RecordingServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "upload", str(folder), "--url", server.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "published poet@0123456789ab: LoRA, 2 of 7 linear, 1 of 1 embedding, 2.5 MB",
        "warning: it was trained on some/base",
        "warning: its tokenizer differs",
    ]


def shown(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_inspect_sends_a_folder_without_a_name_and_shows_the_report(
    server: RecordingServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = (200, VERSION)
    assert main(["adapter", "inspect", str(folder), "--url", server.url]) == 0
    ((method, path, headers, body),) = server.asked
    assert (method, path) == ("POST", "/v1/adapters/inspect")
    assert [part[:2] for part in parts(headers, body)] == [
        ("files", "adapter_config.json"),
        ("files", "adapter_model.safetensors"),
    ]
    assert shown(capsys.readouterr().out) == [["poet, version 0123456789ab"], *SHOWN]


def test_inspect_sends_an_archive_unchanged(server: RecordingServer, tmp_path: Path) -> None:
    archive = tmp_path / "bard.zip"
    archive.write_bytes(b"packed")
    server.answer = (200, VERSION)
    assert main(["adapter", "inspect", str(archive), "--url", server.url]) == 0
    assert parts(*server.asked[0][2:]) == [("archive", "bard.zip", b"packed")]


def test_inspect_treats_what_is_not_a_path_as_an_adapter_s_name(
    server: RecordingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "inspect", "poet", "--url", server.url]) == 0
    assert server.asked[0][:2] == ("GET", "/v1/adapters/poet")
    assert shown(capsys.readouterr().out) == [["poet, version 0123456789ab"], *SHOWN]


def test_inspect_can_print_the_raw_response(server: RecordingServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "inspect", "poet", "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == ADAPTER


@pytest.mark.parametrize(
    "answer", [{}, {"versions": []}, {"name": "poet", "versions": [{"digest": "0", "report": {}}]}]
)
def test_a_response_without_a_report_is_shown_partly(server: RecordingServer, answer: object) -> None:
    server.answer = (200, answer)
    assert main(["adapter", "inspect", "poet", "--url", server.url]) == 0


def test_a_missing_path_is_reported_without_a_request(
    server: RecordingServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "inspect", str(tmp_path / "none"), "--url", server.url]) == 1
    assert "there is no folder or archive" in capsys.readouterr().err
    assert server.asked == []


def test_a_refused_inspection_prints_the_reason_and_fails(
    server: RecordingServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = (422, {"error": {"message": "OFT is not served: it rotates"}})
    assert main(["adapter", "inspect", str(folder), "--url", server.url]) == 1
    assert "422: OFT is not served: it rotates" in capsys.readouterr().err


def test_a_folder_that_is_not_an_adapter_is_not_sent(
    server: RecordingServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "upload", str(tmp_path), "--url", server.url]) == 1
    assert "adapter_config.json" in capsys.readouterr().err
    assert server.asked == []


@pytest.mark.parametrize(
    ("action", "method", "path"),
    [
        ("show", "GET", "/v1/adapters/poet"),
        ("delete", "DELETE", "/v1/adapters/poet"),
        ("load", "POST", "/v1/adapters/poet/load"),
        ("evict", "POST", "/v1/adapters/poet/evict"),
        ("pin", "POST", "/v1/adapters/poet/pin"),
        ("unpin", "POST", "/v1/adapters/poet/unpin"),
    ],
)
def test_each_action_calls_its_route(
    server: RecordingServer, capsys: pytest.CaptureFixture[str], action: str, method: str, path: str
) -> None:
    assert main(["adapter", action, "poet", "--url", server.url]) == 0
    assert server.asked[0][:2] == (method, path)
    assert shown(capsys.readouterr().out)[-1] == (["deleted poet"] if action == "delete" else ROW)
    assert main(["adapter", action, "poet", "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == ADAPTER


def test_list_prints_a_line_per_adapter_with_the_tiers_it_is_in(
    server: RecordingServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SERVE_API_KEY", "sk-env")
    broken = {"name": "bard\x1b[31m", "pinned": False, "broken": "it is damaged", "versions": []}
    answer = {"object": "list", "data": [broken, ADAPTER]}
    server.answer = (200, answer)
    assert main(["adapter", "list", "--url", server.url]) == 0
    assert server.asked[0][2]["Authorization"] == "Bearer sk-env"
    rows = shown(capsys.readouterr().out)
    assert rows[0] == ["name", "version", "rank", "size", "where", "leases", "pinned"]
    assert rows[1:] == [["bard?[31m", "broken"], ROW]
    assert main(["adapter", "list", "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((409, {"error": {"message": "the name is taken"}}), "409: the name is taken"),
        ((502, {"detail": "bad gateway"}), "502: "),
    ],
)
def test_an_error_is_printed_with_the_server_s_message(
    server: RecordingServer, capsys: pytest.CaptureFixture[str], answer: tuple[int, object], said: str
) -> None:
    server.answer = answer
    assert main(["adapter", "show", "poet", "--url", server.url]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "file:///etc"])
def test_an_unreachable_server_is_reported(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "list", "--url", url]) == 1
    assert capsys.readouterr().err.startswith("lora-serve: ")
