"""The server of the adapter laws: started on a workspace with adapters of its own, and its routes for adapters."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch

from bench.serving.adapter_sets import AdapterMaker, files
from bench.serving.adapter_traffic import Sizes
from bench.serving.client import Server, list_models
from bench.serving.launch import LORA_SERVE, launched

START = 900.0  # seconds that a server may take to start: thousands of adapters are published then


@dataclass(frozen=True)
class AdapterRoutes:
    """The admin routes of a running server. Methods block; RuntimeError if the server refuses."""

    url: str

    def call(self, method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
        """The body of the answer."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=START)
        try:
            connection.request(method, path, body, {"Content-Type": content_type})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:300].decode(errors='replace')}")
        return content

    def info(self, name: str) -> dict[str, Any]:
        """The newest version of an adapter."""
        version: dict[str, Any] = json.loads(self.call("GET", f"/v1/adapters/{name}"))["versions"][0]
        return version

    def load(self, name: str) -> None:
        self.call("POST", f"/v1/adapters/{name}/load")

    def evict(self, name: str) -> None:
        """Evict an adapter; returns once it is on the disk only."""
        self.call("POST", f"/v1/adapters/{name}/evict")
        end = time.monotonic() + 30
        while (tiers := self.info(name)["tiers"]) != ["disk"]:
            if time.monotonic() > end:
                raise RuntimeError(f"{name} was evicted and is still in {tiers}")
            time.sleep(0.01)

    def delete(self, name: str) -> None:
        self.call("DELETE", f"/v1/adapters/{name}")

    def tier_bytes(self, tier: str) -> int:
        """Bytes that adapters take in a tier, by the metrics of an idle server, which are up to a second old."""
        time.sleep(1.5)
        metrics = self.call("GET", "/metrics").decode()
        found = re.search(rf'^lora_serve_adapter_bytes{{tier="{tier}"}} (\S+)', metrics, re.MULTILINE)
        return int(float(found[1])) if found else 0

    async def upload(self, form: bytes) -> tuple[float, float]:
        """Publish what `upload_form` made, beside the event loop; returns when the upload began and was answered."""

        def send() -> tuple[float, float]:
            begin = time.perf_counter()
            boundary = form[2 : form.index(b"\r\n")].decode()
            self.call("POST", "/v1/adapters", form, f"multipart/form-data; boundary={boundary}")
            return begin, time.perf_counter()

        return await asyncio.to_thread(send)


def upload_form(name: str, folder: Path) -> bytes:
    """The multipart form that publishes a folder, beginning with its boundary."""
    boundary = uuid4().hex
    disposition = f"--{boundary}\r\nContent-Disposition: form-data; name="
    parts = [f'{disposition}"name"\r\n\r\n{name}\r\n'.encode()]
    for path in files(folder):
        parts += [f'{disposition}"files"; filename="{path.name}"\r\n\r\n'.encode(), path.read_bytes(), b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()])


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        adapters: in use at most, for the registry.
        started: given at start, for the time to publish.
        seconds: of one closed loop.
        clients: of a closed loop.
    """

    adapters: int
    started: int
    repeats: int
    seconds: float
    clients: int = 8
    sizes: Sizes = field(default_factory=Sizes)


@dataclass(frozen=True)
class Workspace:
    """What every law has: the model, adapters for it, the scale, and a folder for stores.

    Attributes:
        dtype: that adapters are served in.
        options: of every server.
        context: tokens that a request may have.
        command: that starts a server.
        patience: seconds that a server may take to start.
    """

    model: Path
    folder: Path
    maker: AdapterMaker
    dtype: torch.dtype
    options: tuple[str, ...]
    context: int
    scale: Scale
    command: tuple[str, ...] = LORA_SERVE
    patience: float = START

    @property
    def rank8(self) -> list[str]:
        """Common adapters of rank 8, as many as clients."""
        return [f"eight{index:02}" for index in range(self.scale.clients)]

    @property
    def rank16(self) -> list[str]:
        """Common adapters of rank 16, twice as many as clients."""
        return [f"sixteen{index:02}" for index in range(2 * self.scale.clients)]

    @property
    def rank128(self) -> list[str]:
        """Two common adapters of rank 128."""
        return ["large00", "large01"]

    def make_common(self) -> Path:
        """Write the common adapters, unless they are there; returns their folder."""
        if not self.maker.folder.exists():
            for rank, names in ((8, self.rank8), (16, self.rank16), (128, self.rank128)):
                for name in names:
                    self.maker.make(name, rank)
        return self.maker.folder

    @contextmanager
    def serving(
        self, *more: str, adapters: Path | None = None, store: str = "store", log: Path | None = None
    ) -> Iterator[tuple[Server, AdapterRoutes]]:
        """A server with the common adapters, or those of a folder, in a store of the workspace."""
        arguments = [str(self.model), "--store", str(self.folder / store), *self.options, *more]
        arguments += ["--adapters", str(adapters or self.make_common())]
        with launched(arguments, command=self.command, timeout=self.patience, log=log) as url:
            yield Server(url, list_models(url)[0]), AdapterRoutes(url)
