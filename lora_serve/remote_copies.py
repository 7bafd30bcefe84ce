"""The `lora-serve adapter pull` and `push` commands: an adapter's files copied to a folder, or to another server."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path
from urllib import parse

from pydantic import Field
from pydantic_settings import CliPositionalArg

from lora_serve import reports
from lora_serve.adapters.store.records import KEPT, describe_folder
from lora_serve.errors import AdapterInvalid, BadRequest, ServeError
from lora_serve.names import SETTINGS
from lora_serve.remote import RemoteCommand, RemoteServer


class CopyCommand(RemoteCommand):
    """Base of both: which adapter."""

    adapter: CliPositionalArg[str] = Field(description="NAME, or NAME@VERSION with the beginning of a digest")

    @property
    def name(self) -> str:
        return self.adapter.partition("@")[0]

    def fetch_files(self, folder: Path) -> str:
        """Download the files of the version into an empty folder. Returns its digest, of which the files are checked.

        Raises: `ServeError`, also for files that are not complete or not those of the version.
        """
        version = self.adapter.partition("@")[2]
        query = f"?version={parse.quote(version, safe='')}" if version else ""
        with tempfile.TemporaryFile(dir=folder.parent) as packed:
            etag = self.download(f"/v1/adapters/{parse.quote(self.name, safe='')}/files{query}", packed)
            packed.seek(0)
            try:
                with tarfile.open(fileobj=packed, mode="r:") as archive:
                    for member in archive:
                        if member.name not in KEPT or not member.isreg():
                            raise AdapterInvalid(f"the server sent {member.name!r:.80}, which is no file of an adapter")
                        archive.extract(member, folder, set_attrs=False, filter="data")
            except tarfile.TarError as error:
                raise ServeError(f"what the server sent is no tar ({error})") from error
        digest = describe_folder(folder).digest
        if etag and digest != etag:
            raise ServeError(f"the files are of version {digest[:12]}, the server says {etag[:12]}")
        return digest


class PullCommand(CopyCommand):
    """Copy an adapter from a server, as the PEFT folder that was published; needs an admin key."""

    to: Path | None = Field(None, description="folder to make (default: the adapter's name)")

    def run(self) -> None:
        target = self.to or Path(self.name)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise BadRequest(f"{target} exists and is not an empty folder", param="to")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as parent:
                folder = Path(parent) / "files"
                folder.mkdir()
                digest = self.fetch_files(folder)
                folder.rename(target)  # also over an empty folder
        except OSError as error:
            raise ServeError(f"{error.filename or target}: {error.strerror or error}") from error
        reports.print_lines([f"{self.name}@{digest[:12]} → {target}"])


class PushCommand(CopyCommand):
    """Copy an adapter from the server at --url to another one; both need an admin key."""

    to: str = Field(description="address of the other server")
    to_api_key: str | None = Field(None, description="API key of the other server (default: that of this one)")
    name_there: str | None = Field(None, alias="as", description="name to publish it under (default: its own)")
    replace: bool = Field(False, description="publish a new version if the name exists there")

    def run(self) -> None:
        name = self.name_there or self.name
        other = RemoteServer(url=self.to, api_key=self.to_api_key or self.api_key)
        where = f"/v1/adapters/{parse.quote(name, safe='')}" if self.replace else "/v1/adapters"
        try:
            with tempfile.TemporaryDirectory(prefix="lora-serve-push-") as parent:
                folder = Path(parent) / name.replace(os.sep, "_")
                folder.mkdir()
                digest = self.fetch_files(folder)
                trust = (folder / SETTINGS).is_file()  # an administrator of the first server did
                answer = other.send("PUT" if self.replace else "POST", where, folder, name, trust_settings=trust)
        except OSError as error:
            raise ServeError(f"{error.filename}: {error.strerror or error}") from error
        reports.print_published(answer)
        if answer["versions"][0]["digest"] != digest:
            raise ServeError(f"the other server made another version of the files of {digest[:12]}")
