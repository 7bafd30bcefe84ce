"""The `lora-serve key …` commands, which write the file of API keys that a server reads again when it changes."""

from __future__ import annotations

import fcntl
import os
import secrets
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from pydantic_settings import CliPositionalArg, CliSubCommand
from rich.console import Console
from rich.table import Table

from lora_serve.errors import BadRequest, ServeError
from lora_serve.names import NAME_PATTERN

ENVIRONMENT = "LORA_SERVE_API_KEY_FILE"


class KeyCommand(BaseModel, ABC):
    """Base of the commands: which file."""

    file: Path | None = Field(None, description=f"the key file (or in the environment as {ENVIRONMENT})")

    def run(self) -> None:
        """Execute the command. Raises: `ServeError`."""
        try:
            with _locked(self.path):
                self.act()
        except OSError as error:
            raise ServeError(f"{error.filename or self.path}: {error.strerror or error}") from error

    @abstractmethod
    def act(self) -> None:
        """As `run`; raises OSError too."""

    @property
    def path(self) -> Path:
        if self.file is not None:
            return self.file
        if given := os.environ.get(ENVIRONMENT):
            return Path(given)
        raise BadRequest(f"name the key file with --file, or in the environment as {ENVIRONMENT}")

    def read(self) -> Any:
        """The file's entries, with its comments; none if there is no file yet."""
        from ruamel.yaml.comments import CommentedMap  # here, as below: the other commands start faster

        if not self.path.exists():
            return CommentedMap()
        check(self.path)
        return _yaml().load(self.path.read_text())

    def write(self, entries: Any) -> None:
        """Replace the file as a whole, after it was checked; a new one can be read by its owner only."""
        path = self.path.resolve()  # not a link to it
        status = path.stat() if path.exists() else None
        mode, owner = (0o600, None) if status is None else (status.st_mode & 0o777, (status.st_uid, status.st_gid))
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                os.fchmod(handle, mode)
                if owner is not None and owner != (os.getuid(), os.getgid()):
                    os.fchown(handle, *owner)  # the server's user must still be able to read it
                _yaml().dump(entries, file)
                file.flush()
                os.fsync(handle)
            check(Path(name))
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


class KeyAddCommand(KeyCommand):
    """Make an API key: adds it to the key file, and prints it. It is shown only now."""

    name: CliPositionalArg[str] = Field(pattern=f"^{NAME_PATTERN}$", description="whose key it is")
    admin: bool = Field(False, description="may also publish and delete adapters")
    metrics: bool = Field(False, description="may also read /metrics and everybody's usage")
    adapters: list[str] = Field([], description="names or patterns of the adapters it may use (default: all)")
    share: float | None = Field(None, description="of what the server computes while others wait (default: 1)")
    requests_per_minute: int | None = Field(None, ge=1, description="requests a minute (default: no limit)")
    tokens_per_minute: int | None = Field(None, ge=1, description="tokens a minute (default: no limit)")
    concurrent: int | None = Field(None, ge=1, description="requests at the same time (default: no limit)")

    def act(self) -> None:
        from lora_serve.api.key_file import hash_key

        entries = self.read()
        if self.name in entries:
            raise BadRequest(f"{self.path} has a key of {self.name} already; `lora-serve key revoke` removes it")
        secret = f"sk-{secrets.token_urlsafe(32)}"
        limits = {name: getattr(self, name) for name in ("requests_per_minute", "tokens_per_minute", "concurrent")}
        given = {
            "admin": self.admin,
            "metrics": self.metrics,
            "adapters": self.adapters,
            "share": self.share,
            "limits": {name: value for name, value in limits.items() if value},
        }
        set_ = {name: value for name, value in given.items() if value or (name == "share" and value is not None)}
        entries[_quoted(self.name)] = {"hash": hash_key(secret)} | set_
        self.write(entries)
        print(f"added {self.name} to {self.path}; its key is shown only now:", file=sys.stderr)
        print(secret)


class KeyListCommand(KeyCommand):
    """List the keys and what they may do."""

    def act(self) -> None:
        from lora_serve.api.key_file import read_keys

        if not self.path.exists():
            raise BadRequest(f"there is no key file {self.path}")
        table = Table(box=None, header_style="", padding=(0, 2, 0, 0))
        for title in ("name", "admin", "metrics", "adapters", "share", "limits", "limits per adapter"):
            table.add_column(title, overflow="fold")
        for caller in sorted(read_keys(self.path).values(), key=lambda caller: caller.name):
            adapters = "all" if caller.adapters is None else ", ".join(caller.adapters)
            limits = (caller.limits, caller.limits_per_adapter)
            table.add_row(
                caller.name, *("yes" if each else "no" for each in (caller.admin, caller.metrics)), adapters,
                f"{caller.share:g}", *(_describe(each.model_dump(exclude_none=True)) for each in limits),
            )  # fmt: skip
        Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)


class KeyRevokeCommand(KeyCommand):
    """Remove a key from the key file: a running server refuses it within a second or two."""

    name: CliPositionalArg[str] = Field(description="whose key it is")

    def act(self) -> None:
        entries = self.read()
        if self.name not in entries:
            known = ", ".join(map(str, entries)) or "none"
            raise BadRequest(f"{self.path} has no key of {self.name}; there are: {known}")
        if len(entries) == 1:  # a server would keep its keys as they were
            raise BadRequest(f"{self.name} is the only key, and a key file needs one: add another first")
        del entries[self.name]
        self.write(entries)
        print(f"removed {self.name} from {self.path}", file=sys.stderr)


class KeyCommands(BaseModel):
    """API keys of a server, in the file that --api-key-file names."""

    add: CliSubCommand[KeyAddCommand] = Field(description="make a key")
    list: CliSubCommand[KeyListCommand] = Field(description="list the keys")
    revoke: CliSubCommand[KeyRevokeCommand] = Field(description="remove a key")


def check(path: Path) -> None:
    """Check that a server would accept a key file. Raises `BadRequest`."""
    from lora_serve.api.key_file import read_keys

    read_keys(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One command at a time for the key files of a folder: each reads the file and then replaces it."""
    handle = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _quoted(name: str) -> Any:
    """A name in quotes: without, YAML's versions do not agree on what `on` and `1_0` are."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    return DoubleQuotedScalarString(name)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 10_000  # no line breaks of its own
    yaml.preserve_quotes = True
    return yaml


def _describe(limits: dict[str, int]) -> str:
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in limits.items()) or "none"
