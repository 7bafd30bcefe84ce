"""`lora-serve adapter …`: the adapter routes of a running server, from the command line.

A thin client on the standard library; what the server answers is shown as it is.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any
from urllib import error, parse, request

from pydantic import BaseModel, Field
from pydantic_settings import CliPositionalArg, CliSubCommand

from lora_serve import reports
from lora_serve.errors import BadRequest, ServeError, Unavailable
from lora_serve.names import CONFIG, TOKENIZER, WEIGHTS

TIMEOUT = 600.0  # seconds; checking and storing a large adapter takes a while
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


class Remote(BaseModel, ABC):
    """Where the server is and who asks."""

    url: str = Field("http://127.0.0.1:8000", description="address of the server")
    api_key: str | None = Field(None, description="API key (or in the environment as LORA_SERVE_API_KEY)")

    @abstractmethod
    def run(self) -> None:
        """Do what the subcommand is for. Raises: `ServeError`."""

    def ask(self, method: str, path: str, body: IO[bytes] | None = None, content_type: str = "") -> Any:
        """One request; returns the JSON of the answer. Raises a `ServeError` with the server's own words."""
        headers = {"Accept": "application/json"}
        if key := self.api_key or os.environ.get("LORA_SERVE_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        if body is not None:
            headers |= {"Content-Type": content_type, "Content-Length": str(body.seek(0, os.SEEK_END))}
            body.seek(0)
        if not self.url.startswith(("http://", "https://")):
            raise BadRequest("--url must begin with http:// or https://", param="url")
        try:
            asked = request.Request(self.url.rstrip("/") + path, data=body, headers=headers, method=method)
            with request.urlopen(asked, timeout=TIMEOUT) as answer:
                text = answer.read()
        except error.HTTPError as refusal:
            with refusal:
                raise ServeError(f"{refusal.code}: {_reason(refusal.read())}") from None
        except (error.URLError, http.client.HTTPException, OSError) as failure:
            raise Unavailable(f"no answer from {self.url} ({getattr(failure, 'reason', failure)})") from failure
        return json.loads(text) if text else None

    def send(self, method: str, where: str, path: Path, name: str | None = None) -> Any:
        """Send the adapter at `path`, a folder or an archive. Raises `BadRequest` if it is neither."""
        archive = path.is_file() and path.name.endswith(ARCHIVES)
        files = [path] if archive else adapter_files(path)
        boundary = uuid.uuid4().hex
        with tempfile.TemporaryFile() as body:
            write_form(body, boundary, name, "archive" if archive else "files", files)
            return self.ask(method, where, body, f"multipart/form-data; boundary={boundary}")


class List(Remote):
    """List all adapters, where they are and what they cost."""

    def run(self) -> None:
        answer = self.ask("GET", "/v1/adapters")
        reports.as_table(answer["data"] if isinstance(answer, dict) else answer)


class Upload(Remote):
    """Publish a PEFT adapter: a folder with adapter_config.json and safetensors, or a .tar, .tar.gz or .zip of one."""

    path: CliPositionalArg[Path] = Field(description="folder or archive")
    name: str | None = Field(None, description="name to serve it under (default: the folder's or archive's own)")
    replace: bool = Field(False, description="publish a new version if the name exists")

    def run(self) -> None:
        name = self.name or self.path.resolve().name.removesuffix(".gz").split(".")[0]
        where = f"/v1/adapters/{parse.quote(name, safe='')}" if self.replace else "/v1/adapters"
        reports.in_short(self.send("PUT" if self.replace else "POST", where, self.path, name))


class Inspect(Remote):
    """Say what an adapter is, what the server would make of it, and what to beware of; nothing is published."""

    adapter: CliPositionalArg[str] = Field(
        description="PATH of a folder or archive, which is sent to the server, or NAME of a published adapter"
    )
    as_json: bool = Field(False, alias="json", description="print the server's answer as it is")

    def run(self) -> None:
        path = Path(self.adapter)
        local = len(self.adapter) < 4096 and os.path.exists(path)  # unlike Path's own, of any name
        if local:
            answer = self.send("POST", "/v1/adapters/inspect", path)
        elif path.name != self.adapter:
            raise BadRequest(f"there is no folder or archive {self.adapter}")
        else:
            answer = self.ask("GET", f"/v1/adapters/{parse.quote(self.adapter, safe='')}")
        if self.as_json:
            reports.as_json(answer)
        else:
            reports.in_full(answer, path.resolve().name if local else self.adapter)


class Named(Remote):
    name: CliPositionalArg[str] = Field(description="name of the adapter")

    def act(self, method: str, action: str = "") -> None:
        reports.as_json(self.ask(method, f"/v1/adapters/{parse.quote(self.name, safe='')}{action}"))


class Show(Named):
    """Show one adapter."""

    def run(self) -> None:
        self.act("GET")


class Delete(Named):
    """Delete an adapter; running requests finish first."""

    def run(self) -> None:
        self.act("DELETE")


class Load(Named):
    """Bring an adapter into memory before it is asked for."""

    def run(self) -> None:
        self.act("POST", "/load")


class Evict(Named):
    """Take an adapter out of memory; it stays published."""

    def run(self) -> None:
        self.act("POST", "/evict")


class Pin(Named):
    """Load an adapter and never evict it to make room."""

    def run(self) -> None:
        self.act("POST", "/pin")


class Unpin(Named):
    """Let an adapter be evicted again."""

    def run(self) -> None:
        self.act("POST", "/unpin")


class AdapterCommand(BaseModel):
    """List, inspect, publish and manage the adapters of a running server."""

    list: CliSubCommand[List]
    show: CliSubCommand[Show]
    upload: CliSubCommand[Upload]
    inspect: CliSubCommand[Inspect]
    delete: CliSubCommand[Delete]
    load: CliSubCommand[Load]
    evict: CliSubCommand[Evict]
    pin: CliSubCommand[Pin]
    unpin: CliSubCommand[Unpin]


def adapter_files(folder: Path) -> list[Path]:
    """The files of a PEFT folder that the server wants. Raises `BadRequest` if it is not one."""
    files = [folder / CONFIG, folder / WEIGHTS]
    if not all(path.is_file() for path in files):
        raise BadRequest(f"{folder} is neither an archive nor a folder with {CONFIG} and {WEIGHTS}")
    return files + [path for path in [folder / TOKENIZER] if path.is_file()]


def write_form(body: IO[bytes], boundary: str, name: str | None, field: str, files: list[Path]) -> None:
    """A multipart form with the field `name` and one file part per file, written through so that size is no matter."""
    if name is not None:
        body.write(f'--{boundary}\r\nContent-Disposition: form-data; name="name"\r\n\r\n{name}\r\n'.encode())
    for path in files:
        shown = parse.quote(path.name)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{shown}"\r\n'
        body.write(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode())
        with path.open("rb") as content:
            shutil.copyfileobj(content, body)
        body.write(b"\r\n")
    body.write(f"--{boundary}--\r\n".encode())


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500] or "no reason given"
