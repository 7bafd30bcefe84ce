"""Adapter uploads: a multipart form streamed to the store's staging folder.

Memory use is bounded, whatever the size of the upload, and the staging folder is removed on success, error and
disconnect alike. The content of the adapter's files is checked by the engine.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from starlette.requests import Request

from lora_serve.adapter_files import ADAPTER_FILES, describe_missing
from lora_serve.adapters import archive
from lora_serve.api.multipart import LONGEST_FIELD, Form, receive_form, unknown_field
from lora_serve.errors import BadRequest, StorageFull
from lora_serve.names import CONFIG, POOLING, SETTINGS, WEIGHTS
from lora_serve.serve_settings import MOST_BYTES

MOST_FILES = 64
# Folders in which sentence-transformers keeps the configuration of what follows the transformer.
MODULE_FOLDERS = re.compile(r"[0-9]_(Pooling|Normalize|Dense|LayerNorm|Dropout)")


@dataclass(frozen=True)
class ReceivedUpload:
    """What is to be published: the name, if sent, and a new folder with the adapter's files.

    From a source (`source_body.py`) the folder may hold an archive; `source` is where it was fetched from, and `digest`
    what the version's must begin with. Both are empty for a form. `trust_settings`: its `serve.yaml` counts.
    """

    name: str | None
    folder: Path
    source: str = ""
    digest: str = ""
    trust_settings: bool = False


@asynccontextmanager
async def staging_folder(staging: Path) -> AsyncIterator[Path]:
    """A new folder in `staging`, removed with its content when the context ends.

    It is locked meanwhile: a restarted engine, which opens the store again, leaves it alone. Inside the context, a full
    disk raises `StorageFull`.
    """
    root = staging / f"upload-{uuid.uuid4().hex}"
    lock = None
    with disk_errors():
        try:
            await asyncio.to_thread(root.mkdir, parents=True)
            lock = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield root
        finally:
            if lock is not None:
                os.close(lock)
            # Shielded: a cancelled request removes its folder too.
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, root, True))


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise `StorageFull` for an `OSError` of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in StorageFull.errnos:
            raise StorageFull("the disk of the adapter store is full") from error
        raise


@asynccontextmanager
async def receive_upload(
    request: Request, staging: Path, most: int, is_busy: Callable[[], bool]
) -> AsyncIterator[ReceivedUpload]:
    """Receive the multipart form of `request`; the folder exists as long as the context.

    Args:
        most: bytes of the adapter's files together, unpacked.
        is_busy: as of `receive_form`.

    Raises: `BadRequest`, `AdapterInvalid`, `TooLarge`, `StorageFull`.
    """
    async with staging_folder(staging) as root:
        form = _AdapterForm(root, most)
        await receive_form(request, form, is_busy)
        yield await asyncio.to_thread(form.finish)


class _AdapterForm(Form):
    """A name, and files or one archive, which are written to disk; and what is said about the adapter's settings."""

    def __init__(self, root: Path, most: int) -> None:
        super().__init__(most)
        self._archive = root / "archive"
        self._folder = root / "adapter"
        self._folder.mkdir()
        self._texts: dict[str, bytearray] = {}  # of the fields that are no files
        self._files: set[str] = set()  # sent so far, including those that are left out
        self._open: IO[bytes] | None = None
        self._field = ""

    def begin_part(self, field: str, file_name: str) -> None:
        self._field = field
        match field:
            case "name" | "trust_settings" | "settings":
                if field in self._texts:
                    raise BadRequest(f"{field} was sent twice", param=field)
                self._texts[field] = bytearray()
            case "archive":
                if self._archive.exists():
                    raise BadRequest("send one archive only", param="archive")
                self._open = self._archive.open("xb")
            case "files":
                self._begin_file(_file_of(file_name.replace("\\", "/")), file_name)
            case _:
                raise unknown_field(field)

    def part_data(self, piece: memoryview) -> None:
        if (text := self._texts.get(self._field)) is not None:
            text += piece
            if len(text) > (MOST_BYTES if self._field == "settings" else LONGEST_FIELD):
                raise BadRequest(f"the {self._field} is too long", param=self._field)
        elif self._open is not None:
            self._open.write(piece)

    def end_part(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def finish(self) -> ReceivedUpload:
        """The upload, once the form is complete. Raises `BadRequest` that names what is missing."""
        if self._archive.exists():
            if self._files:
                raise BadRequest("send either files or one archive, not both", param="archive")
            archive.unpack(self._archive, self._folder, self.most)
            self._archive.unlink()
        elif not self._files:
            raise BadRequest("the adapter is missing: send files, or one archive", param="files")
        elif not {CONFIG, WEIGHTS} <= self._files:
            raise BadRequest(describe_missing(self._files), param="files")
        name, settings = self._texts.get("name"), self._texts.get("settings")
        if settings is not None:
            (self._folder / SETTINGS).write_bytes(settings)
        return ReceivedUpload(
            None if name is None else name.decode(errors="replace"),
            self._folder,
            trust_settings=self._trusts_settings() or settings is not None,
        )

    def _trusts_settings(self) -> bool:
        given = self._texts.get("trust_settings", b"false")
        if given not in (b"true", b"false"):
            raise BadRequest("trust_settings must be true or false", param="trust_settings")
        return given == b"true"

    def _begin_file(self, name: str, path: str) -> None:
        if not path:
            raise BadRequest("every one of files needs a file name", param="files")
        if not name:
            return
        if name in self._files:
            raise BadRequest(f"{name[:100]} was sent twice", param="files")
        if len(self._files) >= MOST_FILES:
            raise BadRequest(f"more than {MOST_FILES} files", param="files")
        self._files.add(name)
        if name in ADAPTER_FILES:
            (self._folder / name).parent.mkdir(exist_ok=True)
            self._open = (self._folder / name).open("xb")


def _file_of(path: str) -> str:
    """The name under which a file of a form is kept: without folders, except for `1_Pooling/config.json`.

    Empty for other files in folders of sentence-transformers' modules: what these do is in `modules.json`.
    """
    parts = PurePosixPath(path).parts
    if len(parts) > 1 and MODULE_FOLDERS.fullmatch(parts[-2]):
        return POOLING if "/".join(parts[-2:]) == POOLING else ""
    return parts[-1] if parts else ""
