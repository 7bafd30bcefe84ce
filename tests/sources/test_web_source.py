"""Adapters on a web server: folders and archives, and servers that are slow, cut off, lie or lead elsewhere."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_bytes import PACKED, WANTED, WEIGHTS
from fetching import Fetching
from web_server import Handler, WebServer

from lora_serve.errors import AdapterInvalid, AdapterNotFound, TooLarge, Unavailable
from lora_serve.sources import fetch, web_files
from lora_serve.sources.web_files import is_public_address

CONFIG_PATH, WEIGHTS_PATH = "/a/poet/adapter_config.json", "/a/poet/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        server.answers |= {f"/a/poet/{name}": content for name, content in WANTED.items()}
        yield server


@pytest.fixture
def source(web: WebServer, tmp_path: Path) -> Fetching:
    return Fetching(f"web=http://{web.host}/a", tmp_path)


@pytest.fixture
def packed(web: WebServer, tmp_path: Path) -> Fetching:
    web.answers["/a/poet.tar.gz"] = PACKED
    return Fetching(f"web=http://{web.host}/a/{{name}}.tar.gz", tmp_path)


def test_a_folder_is_fetched_file_by_file(source: Fetching, web: WebServer) -> None:
    done = source.get()
    assert source.files == WANTED
    assert done.received == sum(map(len, WANTED.values())) == source.received[-1]
    assert web.paths[0] == CONFIG_PATH


def test_an_archive_is_fetched_and_not_opened(packed: Fetching) -> None:
    packed.get()
    assert packed.files == {"archive": PACKED}


def test_what_is_not_there_is_not_found(source: Fetching, packed: Fetching, web: WebServer) -> None:
    for fetching in (source, packed):
        with pytest.raises(AdapterNotFound, match="source web does not have it"):
            fetching.get("nobody")
    assert web.paths == ["/a/nobody/adapter_config.json", "/a/nobody.tar.gz"]  # asked once each


def test_a_folder_without_weights_says_what_is_missing(source: Fetching, web: WebServer) -> None:
    del web.answers[WEIGHTS_PATH]
    with pytest.raises(AdapterInvalid, match=r"source web: adapter_model\.safetensors is missing"):
        source.get()


def test_servers_that_refuse_what_they_do_not_have_will_do(source: Fetching, web: WebServer) -> None:
    web.answers["/a/poet/tokenizer.json"] = lambda answer: answer.send(b"", 403)
    source.get()
    assert source.files == WANTED


@pytest.mark.parametrize("times", [2, 99])
def test_a_transfer_that_breaks_off_is_tried_again_and_given_up(source: Fetching, web: WebServer, times: int) -> None:
    def cut(answer: Handler) -> None:
        breaks = web.paths.count(WEIGHTS_PATH) <= times
        answer.send(WEIGHTS[:70_000] if breaks else WEIGHTS, length=len(WEIGHTS))

    web.answers[WEIGHTS_PATH] = cut
    if times == 2:
        # What was received in vain counts as well; how much that is before an end is noticed is a matter of timing.
        assert source.get().received > sum(map(len, WANTED.values()))
        assert source.files == WANTED
    else:
        with pytest.raises(Unavailable, match=r"source web cannot be read: \w+ \(5 attempts\)") as error:
            source.get()
        assert error.value.retry_after
        assert web.paths.count(WEIGHTS_PATH) == fetch.ATTEMPTS


def test_a_reset_connection_is_tried_again(source: Fetching, web: WebServer) -> None:
    def reset(answer: Handler) -> None:
        if web.paths.count(WEIGHTS_PATH) == 1:
            linger = b"\1\0\0\0\0\0\0\0"
            answer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            answer.connection.close()
        else:
            answer.send(WEIGHTS)

    web.answers[WEIGHTS_PATH] = reset
    source.get()
    assert source.files == WANTED


@pytest.mark.parametrize(("status", "asked"), [(500, 5), (429, 5), (401, 1), (403, 1)])
def test_an_error_is_tried_again_unless_it_is_final(source: Fetching, web: WebServer, status: int, asked: int) -> None:
    web.answers[CONFIG_PATH] = lambda answer: answer.send(b"secret", status)
    with pytest.raises(Unavailable, match=f"source web cannot be read: HTTP {status}") as error:
        source.get()
    assert len(web.asked) == asked
    assert "127.0.0.1" not in error.value.message


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        fetching = Fetching(f"web=http://127.0.0.1:{unused.getsockname()[1]}/a", tmp_path)
        with pytest.raises(Unavailable, match=r"source web cannot be read: Connection refused \(5 attempts\)"):
            fetching.get()


def test_a_server_that_stalls_is_given_up_when_the_time_is_over(
    source: Fetching, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_files, "READ_SECONDS", 0.1)

    def stall(answer: Handler) -> None:
        answer.send(WEIGHTS[:1000], length=len(WEIGHTS))
        time.sleep(0.5)

    web.answers[WEIGHTS_PATH] = stall
    source._seconds = 0.15
    with pytest.raises(Unavailable, match="it does not answer in time"):
        source.get()
    assert web.paths.count(WEIGHTS_PATH) <= 2


def test_more_than_the_limit_is_not_read(web: WebServer, tmp_path: Path) -> None:
    sent = 0

    def endless(answer: Handler) -> None:
        nonlocal sent
        answer.send_response(200)  # without a length, until the connection ends
        answer.end_headers()
        while sent < 100 << 20:
            answer.wfile.write(bytes(1 << 16))
            sent += 1 << 16

    web.answers["/a/poet.tar"] = endless
    with pytest.raises(TooLarge, match="larger than 1,000,000 bytes"):
        Fetching(f"web=http://{web.host}/a/{{name}}.tar", tmp_path, most=1_000_000).get()
    assert sent < 20 << 20


def test_an_archive_that_unpacks_while_it_is_sent_is_refused(packed: Fetching, web: WebServer) -> None:
    web.answers["/a/poet.tar.gz"] = lambda answer: answer.send(PACKED, Content_Encoding="gzip")
    with pytest.raises(Unavailable, match="its answer is not a plain file"):
        packed.get()


def test_a_redirect_on_the_operators_host_is_followed(packed: Fetching, web: WebServer) -> None:
    web.answers["/elsewhere/p"] = PACKED
    web.answers["/a/poet.tar.gz"] = lambda answer: answer.send(b"", 302, Location="/elsewhere/p")
    packed.get()
    assert packed.files == {"archive": PACKED}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_a_redirect_to_a_private_address_is_not_followed(packed: Fetching, web: WebServer, host: str) -> None:
    with WebServer() as private:
        private.answers["/secret"] = b"credentials"
        to = f"http://{host}:{private.server_port}/secret"
        web.answers["/a/poet.tar.gz"] = lambda answer: answer.send(b"", 302, Location=to)
        with pytest.raises(Unavailable, match="it leads to an address that is not public"):
            packed.get()
        assert private.asked == []
    assert len(web.asked) == 1


def test_a_redirect_in_a_circle_ends(packed: Fetching, web: WebServer) -> None:
    web.answers["/a/poet.tar.gz"] = lambda answer: answer.send(b"", 307, Location="/a/poet.tar.gz")
    with pytest.raises(Unavailable, match="redirects more than 5 times"):
        packed.get()


@pytest.mark.parametrize(
    "to", ["http://[", "http://[::1", "http://host:port/x", "http://host:99999/x", "https://", f"http://{'a' * 70}/x"]
)
def test_a_redirect_that_cannot_be_followed_is_not_tried_again(packed: Fetching, web: WebServer, to: str) -> None:
    web.answers["/a/poet.tar.gz"] = lambda answer: answer.send(b"", 302, Location=to)
    with pytest.raises(Unavailable, match=r"source web cannot be read: it redirects to what is no URL$"):
        packed.get()
    assert len(web.asked) == 1


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://host/x", "gopher://host/x"])
def test_a_redirect_to_another_scheme_is_not_followed(packed: Fetching, web: WebServer, to: str) -> None:
    web.answers["/a/poet.tar.gz"] = lambda answer: answer.send(b"", 302, Location=to)
    with pytest.raises(Unavailable, match=r"source web cannot be read: it leads from http to another scheme$"):
        packed.get()
    assert len(web.asked) == 1


def test_credentials_are_sent_to_the_operators_host_only(
    packed: Fetching, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SERVE_SOURCE_OPTIONS_WEB", json.dumps({"headers": {"Authorization": "Bearer hush"}}))
    monkeypatch.setattr(web_files, "is_public_address", lambda host: True)  # the other one stands for a public server
    with WebServer() as other:
        other.answers["/p"] = PACKED
        web.answers["/a/poet.tar.gz"] = lambda answer: answer.send(b"", 302, Location=f"http://{other.host}/p")
        packed.get()
        assert web.asked[0][1]["Authorization"] == "Bearer hush"
        assert "Authorization" not in other.asked[0][1]


def test_options_that_are_no_json_are_named_and_not_shown(packed: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SERVE_SOURCE_OPTIONS_WEB", "Bearer hush")
    with pytest.raises(Unavailable, match="LORA_SERVE_SOURCE_OPTIONS_WEB is not a JSON object") as error:
        packed.get()
    assert "hush" not in error.value.message


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("2002:a00:1::", False),
        ("64:ff9b::a00:1", False),
    ],
)
def test_public_addresses_are_told_from_others(address: str, public: bool) -> None:
    assert is_public_address(address) is public
