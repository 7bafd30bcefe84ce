"""The `lora-serve adapter …` commands: an HTTP client of a running server's adapter routes."""

from __future__ import annotations

import json
import os
import ssl
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any
from urllib import parse
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import BaseModel, Field
from pydantic_settings import CliPositionalArg

from lora_serve import reports
from lora_serve.adapter_files import ADAPTER_FILES, find_adapter
from lora_serve.errors import AdapterInvalid, BadRequest, ServeError, Unavailable
from lora_serve.names import CARD

TIMEOUT = 600.0  # seconds; validating and storing a large adapter takes a while
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
BINARY = "application/octet-stream"
TRUST_SETTINGS = "let the adapter's serve.yaml count: its system prompt, chat template, tokens and defaults"


class RemoteServer(BaseModel):
    """A server as its HTTP client sees it: its address and the API key."""

    url: str = Field("http://127.0.0.1:8000", description="address of the server")
    api_key: str | None = Field(None, description="API key (or in the environment as LORA_SERVE_API_KEY)")

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """Send one request and return the JSON of the answer; arguments and errors as of `fetch`."""
        content = self.fetch(method, path, **body)
        return json.loads(content) if content else None

    def fetch(self, method: str, path: str, **body: Any) -> bytes:
        """Send one request and return the body of the answer.

        Args:
            body: `data` and `files` of a multipart form, as httpx takes them; files are streamed.

        Raises: `ServeError` with the server's message; `Unavailable` if there is no answer, or 503.
        """
        with self._answer(method, path, **body) as answer:
            return bytes(answer.read())

    def download(self, path: str, target: IO[bytes]) -> str:
        """Write what is at `path` to a file as it comes. Returns its entity tag. Raises as `fetch`."""
        with self._answer("GET", path) as answer:
            for chunk in answer.iter_raw():
                target.write(chunk)
            return str(answer.headers.get("ETag", "")).strip('"')

    @contextmanager
    def _answer(self, method: str, path: str, **body: Any) -> Iterator[Any]:
        """Send one request; yields httpx's response, whose body is not read yet, if it is a success."""
        import httpx  # here: `serve`, `key` and --help do without it

        headers = {"Accept": "application/json, */*;q=0.1", "Accept-Encoding": "identity"}
        if key := self.api_key or os.environ.get("LORA_SERVE_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        if not self.url.startswith(("http://", "https://")):
            raise BadRequest("--url must begin with http:// or https://", param="url")
        trusted = ssl.create_default_context()  # the system's certificates; httpx brings its own list
        try:
            # httpx itself would also read ALL_PROXY, and fail on a SOCKS proxy that is not even used for this host.
            with httpx.Client(
                headers=headers, timeout=TIMEOUT, follow_redirects=True, verify=trusted, trust_env=False,
                proxy=_proxy(self.url),
            ) as client, client.stream(method, self.url.rstrip("/") + path, **body) as answer:  # fmt: skip
                if not answer.is_success:
                    error = Unavailable if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else ServeError
                    raise error(f"{answer.status_code}: {_reason(answer.read())}")
                yield answer
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError) as failure:
            hint = "; is `lora-serve serve` running there?" if isinstance(failure, httpx.ConnectError) else ""
            raise Unavailable(f"no answer from {self.url} ({failure}){hint}") from failure

    def send(
        self, method: str, where: str, path: Path, name: str | None = None, *, trust_settings: bool = False
    ) -> Any:
        """Upload the adapter at `path`, a folder or an archive. Raises `BadRequest` if it is neither."""
        fields = ({} if name is None else {"name": name}) | ({"trust_settings": "true"} if trust_settings else {})
        archive = path.is_file() and path.name.endswith(ARCHIVES)
        with ExitStack() as stack:
            files = [
                ("archive" if archive else "files", (name_sent, stack.enter_context(file.open("rb")), BINARY))
                for name_sent, file in ({path.name: path} if archive else adapter_files(path)).items()
            ]
            return self.ask(method, where, data=fields, files=files)


class RemoteCommand(RemoteServer, ABC):
    """Base of the commands, each on one server."""

    @abstractmethod
    def run(self) -> None:
        """Execute the command. Raises: `ServeError`."""


class ShowingCommand(RemoteCommand):
    """Base of the commands that show the server's answer."""

    as_json: bool = Field(False, alias="json", description="print the server's answer as JSON")

    def show(self, answer: Any, in_words: Callable[[Any], None]) -> None:
        """Print an answer for people, or as JSON."""
        (reports.print_json if self.as_json else in_words)(answer)


class ListCommand(ShowingCommand):
    """List all adapters: newest version, size, the tiers it is in, and what uses it."""

    def run(self) -> None:
        self.show(
            self.ask("GET", "/v1/adapters"),
            lambda answer: reports.print_table(answer["data"] if isinstance(answer, dict) else answer),
        )


class UploadCommand(RemoteCommand):
    """Publish a PEFT adapter: a folder with adapter_config.json and safetensors, or a .tar, .tar.gz or .zip of one."""

    path: CliPositionalArg[Path] = Field(description="folder or archive")
    name: str | None = Field(None, description="name to serve it under (default: the folder's or archive's own)")
    replace: bool = Field(False, description="publish a new version if the name exists")
    trust_settings: bool = Field(False, description=TRUST_SETTINGS)

    def run(self) -> None:
        name = self.name or self.path.resolve().name.removesuffix(".gz").split(".")[0]
        where = f"/v1/adapters/{parse.quote(name, safe='')}" if self.replace else "/v1/adapters"
        method, trust = "PUT" if self.replace else "POST", self.trust_settings
        reports.print_published(self.send(method, where, self.path, name, trust_settings=trust))


class InspectCommand(ShowingCommand):
    """Report what an adapter is, how the server would serve it, and warnings; nothing is published."""

    adapter: CliPositionalArg[str] = Field(
        description="PATH of a folder or archive, which is sent to the server, or NAME of a published adapter"
    )
    trust_settings: bool = Field(False, description=TRUST_SETTINGS)

    def run(self) -> None:
        path = Path(self.adapter)
        local = len(self.adapter) < 4096 and os.path.exists(path)  # not Path.exists, which may raise
        if local:
            answer = self.send("POST", "/v1/adapters/inspect", path, trust_settings=self.trust_settings)
        elif path.name != self.adapter:
            raise BadRequest(f"there is no folder or archive {self.adapter}")
        else:
            answer = self.ask("GET", f"/v1/adapters/{parse.quote(self.adapter, safe='')}")
        title = path.resolve().name if local else self.adapter
        self.show(answer, lambda answer: reports.print_report(answer, title))


class NamedCommand(ShowingCommand):
    """Base of the commands on one adapter."""

    name: CliPositionalArg[str] = Field(description="name of the adapter")

    def act(self, method: str, action: str = "") -> None:
        answer = self.ask(method, f"/v1/adapters/{parse.quote(self.name, safe='')}{action}")
        self.show(answer, lambda answer: reports.print_table([answer]))


class ShowCommand(NamedCommand):
    """Show where one adapter is and what uses it; `inspect` shows what it is."""

    def run(self) -> None:
        self.act("GET")


class DeleteCommand(NamedCommand):
    """Delete an adapter; running requests finish first."""

    def run(self) -> None:
        answer = self.ask("DELETE", f"/v1/adapters/{parse.quote(self.name, safe='')}")
        self.show(answer, lambda answer: reports.print_lines([f"deleted {self.name}"]))


class LoadCommand(NamedCommand):
    """Load an adapter into memory ahead of the first request."""

    def run(self) -> None:
        self.act("POST", "/load")


class EvictCommand(NamedCommand):
    """Evict an adapter from memory; it stays published."""

    def run(self) -> None:
        self.act("POST", "/evict")


class PinCommand(NamedCommand):
    """Load an adapter and exclude it from LRU eviction."""

    def run(self) -> None:
        self.act("POST", "/pin")


class UnpinCommand(NamedCommand):
    """Allow an adapter to be evicted again."""

    def run(self) -> None:
        self.act("POST", "/unpin")


def adapter_files(folder: Path) -> dict[str, Path]:
    """The files to upload of the PEFT folder that `folder` is or contains, by their path in it. Raises `BadRequest`."""
    if not folder.is_dir():
        raise BadRequest(f"{folder} is neither a folder nor an archive ({', '.join(ARCHIVES)})")
    try:
        found = find_adapter(folder)
    except (AdapterInvalid, OSError) as error:
        raise BadRequest(f"{folder} cannot be uploaded: {error}") from None
    if found != folder:
        print(f"lora-serve: the adapter is {found}", file=sys.stderr)
    return {name: found / name for name in ADAPTER_FILES if name != CARD and (found / name).is_file()}


def _proxy(url: str) -> str | None:
    """The HTTP proxy that the environment names for a URL, if any."""
    target = urlsplit(url)
    proxy = getproxies().get(target.scheme)
    if not proxy or proxy_bypass(target.netloc.rpartition("@")[2]):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500] or "no reason given"
