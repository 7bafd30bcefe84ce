"""`lora-serve adapter …` against a small HTTP server that keeps what it was asked."""

from __future__ import annotations

import email
import json
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lora_serve.cli import main

ADAPTER = {
    "name": "poet",
    "pinned": True,
    "versions": [{"digest": "0123456789abcdef", "rank": 8, "memory_bytes": 2_500_000, "tiers": ["disk"], "leases": 1}],
}


class Handler(BaseHTTPRequestHandler):
    server: Answering

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


class Answering(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, Message, bytes]] = []
        self.answer: tuple[int, object] = (200, ADAPTER)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Answering]:
    with Answering() as server:
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


def test_upload_sends_the_adapters_files_under_the_folders_name(server: Answering, folder: Path) -> None:
    assert main(["adapter", "upload", str(folder), "--url", server.url, "--api-key", "sk-1"]) == 0
    ((method, path, headers, body),) = server.asked
    assert (method, path, headers["Authorization"]) == ("POST", "/v1/adapters", "Bearer sk-1")
    assert parts(headers, body) == [
        ("name", None, b"poet"),
        ("files", "adapter_config.json", b'{"r": 8}'),
        ("files", "adapter_model.safetensors", bytes(range(256)) + b"\r\n--"),
    ]


def test_upload_sends_an_archive_as_it_is_and_can_replace(server: Answering, tmp_path: Path) -> None:
    archive = tmp_path / "bard.tar.gz"
    archive.write_bytes(b"packed")
    assert main(["adapter", "upload", str(archive), "--replace", "--url", server.url]) == 0
    ((method, path, headers, body),) = server.asked
    assert (method, path) == ("PUT", "/v1/adapters/bard")
    assert parts(headers, body) == [("name", None, b"bard"), ("archive", "bard.tar.gz", b"packed")]


def test_what_is_no_adapter_is_not_sent(server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_each_action_asks_its_route(
    server: Answering, capsys: pytest.CaptureFixture[str], action: str, method: str, path: str
) -> None:
    assert main(["adapter", action, "poet", "--url", server.url]) == 0
    assert server.asked[0][:2] == (method, path)
    assert json.loads(capsys.readouterr().out) == ADAPTER


def test_list_shows_a_line_per_adapter(
    server: Answering, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SERVE_API_KEY", "sk-env")
    server.answer = (200, {"object": "list", "data": [ADAPTER]})
    assert main(["adapter", "list", "--url", server.url]) == 0
    assert server.asked[0][2]["Authorization"] == "Bearer sk-env"
    shown = capsys.readouterr().out.splitlines()[1].split()
    assert shown == ["poet", "0123456789ab", "8", "2.5", "MB", "disk", "1", "yes"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((409, {"error": {"message": "the name is taken"}}), "409: the name is taken"),
        ((502, {"detail": "bad gateway"}), "502: "),
    ],
)
def test_a_refusal_is_said_in_the_servers_words(
    server: Answering, capsys: pytest.CaptureFixture[str], answer: tuple[int, object], said: str
) -> None:
    server.answer = answer
    assert main(["adapter", "show", "poet", "--url", server.url]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "file:///etc"])
def test_a_server_that_is_not_there_is_said(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "list", "--url", url]) == 1
    assert capsys.readouterr().err.startswith("lora-serve: ")
