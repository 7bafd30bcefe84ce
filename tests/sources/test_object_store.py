"""Adapters in a real object store: moto's S3 server, asked by s3fs as any other."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from adapter_bytes import FILES, MANY, PACKED, WANTED, WEIGHTS
from fetching import Fetching
from moto.server import ThreadedMotoServer

from lora_serve.errors import AdapterInvalid, AdapterNotFound, TooLarge, Unavailable
from lora_serve.sources import fetch, object_files


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """A boto3 client of the store."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    client = boto3.client("s3")
    client.create_bucket(Bucket="adapters")
    for name, content in MANY.items():
        client.put_object(Bucket="adapters", Key=f"prod/poet/{name}", Body=content)
        client.put_object(Bucket="adapters", Key=f"prod/poet-2/{name}", Body=b"another's")
        client.put_object(Bucket="adapters", Key=f"prod/poet/checkpoint-1/{name}", Body=b"an older one")
    client.put_object(Bucket="adapters", Key="prod/packed.tar.gz", Body=PACKED)
    client.put_object(Bucket="adapters", Key="prod/model/config.json", Body=b"{}")
    client.put_object(Bucket="adapters", Key="prod/bare/adapter_config.json", Body=b"{}")
    client.put_object(Bucket="adapters", Key="prod/bare/adapter_model.bin", Body=b"pickle")
    yield client
    server.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


class CuttingProxy(threading.Thread):
    """In front of the store: cuts the first connections after so many bytes of what the store sends."""

    def __init__(self, target: str, connections: int, after: int) -> None:
        super().__init__(daemon=True)
        host, _, port = target.removeprefix("http://").partition(":")
        self._target, self._cuts, self._after = (host, int(port)), connections, after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.cut = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as store:
            threading.Thread(target=self._pass_on, args=(client, store), daemon=True).start()
            sent = 0
            while data := store.recv(1 << 14):
                if self.cut < self._cuts and sent + len(data) > self._after:
                    self.cut += 1
                    client.sendall(data[: self._after - sent])
                    client.shutdown(socket.SHUT_RDWR)  # the other thread reads from it
                    return
                client.sendall(data)
                sent += len(data)

    @staticmethod
    def _pass_on(client: socket.socket, store: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 14):
                store.sendall(data)


@pytest.fixture
def source(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetching:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    return Fetching("s=s3://adapters/prod", tmp_path)


def test_an_adapters_own_files_are_fetched(source: Fetching) -> None:
    assert source.get().received == sum(map(len, WANTED.values()))
    assert source.files == WANTED


def test_an_archive_is_fetched(store: Any, tmp_path: Path) -> None:
    packed = Fetching("s=s3://adapters/prod/{name}.tar.gz", tmp_path)
    packed.get("packed")
    assert packed.files == {"archive": PACKED}


@pytest.mark.parametrize("name", ["nobody", "poe", "model", "packed.tar.gz/x"])
def test_what_is_no_adapter_is_not_found(source: Fetching, name: str) -> None:
    with pytest.raises(AdapterNotFound, match="source s does not have it"):
        source.get(name)


def test_pickled_weights_are_named(source: Fetching) -> None:
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.bin would run code when read"):
        source.get("bare")


def test_a_missing_bucket_is_not_found(store: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound):
        Fetching("s=s3://nobodys-bucket", tmp_path).get()


def test_the_announced_size_is_checked_before_anything_is_read(store: Any, tmp_path: Path) -> None:
    small = Fetching("s=s3://adapters/prod", tmp_path, most=len(WEIGHTS) - 1)
    with pytest.raises(TooLarge):
        small.get()
    assert small.files == {}


def test_weights_in_many_requests_are_of_one_object(
    source: Fetching, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_files, "REQUEST", 100_000)
    monkeypatch.setattr(object_files, "BLOCK", 100_000)
    original = object_files.ObjectFiles.read
    changes = iter([True])

    def read(self: Any, file: Any) -> Any:  # the object is replaced after the listing, once
        if file.path.endswith("weird/adapter_model.safetensors") and next(changes, False):
            store.put_object(Bucket="adapters", Key="prod/weird/adapter_model.safetensors", Body=WEIGHTS[::-1])
        return original(self, file)

    for name, content in FILES.items():
        store.put_object(Bucket="adapters", Key=f"prod/weird/{name}", Body=content)
    monkeypatch.setattr(object_files.ObjectFiles, "read", read)
    source.get("weird")
    assert source.files == FILES | {"adapter_model.safetensors": WEIGHTS[::-1]}
    assert source.received[-1] > sum(map(len, FILES.values()))  # the first attempt was dropped


def test_wrong_credentials_are_refused_without_being_shown(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Unavailable, match="source s cannot be read: ") as error:
        Fetching("s=s3://adapters/prod", tmp_path).get()
    assert "hush" not in error.value.message


def test_a_source_has_options_of_its_own(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = f'{{"endpoint_url": "{os.environ["AWS_ENDPOINT_URL"]}", "key": "other", "secret": "hush"}}'
    monkeypatch.setenv("LORA_SERVE_SOURCE_OPTIONS_S", options)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert Fetching("s=s3://adapters/prod", tmp_path).get().received


def test_a_store_whose_connections_break_in_the_middle_is_asked_again(
    source: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = CuttingProxy(os.environ["AWS_ENDPOINT_URL"], connections=2, after=100_000)
    proxy.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    source.get()
    assert source.files == WANTED
    assert proxy.cut == 2
    proxy.close()


def test_a_store_that_is_down_is_unavailable(source: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with pytest.raises(Unavailable, match=r"source s cannot be read: .* \(5 attempts\)"):
        source.get()
