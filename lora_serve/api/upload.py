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
from typing import IO, TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from lora_serve.adapter_files import ADAPTER_FILES, describe_missing
from lora_serve.api import archive
from lora_serve.api.error_handlers import LONGEST_NAME, UNKNOWN, InvalidField
from lora_serve.errors import BadRequest, StorageFull, TooLarge
from lora_serve.names import CONFIG, POOLING, WEIGHTS

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

BATCH = 1 << 18  # bytes passed to the parser's thread at once
PAUSE = 0.008  # seconds after each batch while requests run: receiving it takes about a quarter of that
FORM_SLACK = 1 << 20  # bytes of boundaries, headers and fields in a form
LONGEST_FIELD = 4096
LONGEST_BOUNDARY = 70  # RFC 2046
MOST_FILES = 64
# Folders in which sentence-transformers keeps the configuration of what follows the transformer.
MODULE_FOLDERS = re.compile(r"[0-9]_(Pooling|Normalize|Dense|LayerNorm|Dropout)")


@dataclass(frozen=True)
class ReceivedUpload:
    """A received form: the `name` field, if sent, and a new folder with the adapter's files."""

    name: str | None
    folder: Path


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
        is_busy: whether requests run, whose compute threads an upload must leave most of the processor.

    Raises: `BadRequest`, `AdapterInvalid`, `TooLarge`, `StorageFull`.
    """
    boundary = _boundary(request)
    announced = request.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > most + FORM_SLACK:
        raise TooLarge(f"the upload is larger than {most:,} bytes")
    async with staging_folder(staging) as root:
        form = _Form(root, most)
        parser = MultipartParser(boundary, form.callbacks())
        try:
            try:
                async for batch in _batches(request):
                    await asyncio.to_thread(form.take, parser, batch)
                    if is_busy():
                        await asyncio.sleep(PAUSE)
            finally:
                form.close()
        except ClientDisconnect:
            raise BadRequest("the upload was cut off") from None
        except FormParserError as error:
            raise BadRequest("the multipart form cannot be read") from error
        yield await asyncio.to_thread(form.finish, most)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("Content-Type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequest("an adapter must be uploaded as multipart/form-data")
    if len(boundary) > LONGEST_BOUNDARY:
        raise BadRequest(f"the form's boundary has {len(boundary)} bytes; at most {LONGEST_BOUNDARY} are allowed")
    return boundary


async def _batches(request: Request) -> AsyncIterator[bytes]:
    batch = bytearray()
    async for chunk in request.stream():
        batch += chunk
        if len(batch) >= BATCH:
            yield bytes(batch)
            batch.clear()
    yield bytes(batch)


class _Form:
    """Callbacks of the multipart parser: writes the form's parts to disk. Runs in a thread, one call at a time."""

    def __init__(self, root: Path, most: int) -> None:
        self._archive = root / "archive"
        self._folder = root / "adapter"
        self._folder.mkdir()
        self._most = most
        self._received = 0
        self._ended = False
        self._name: bytes | None = None
        self._files: set[str] = set()  # sent so far, including those that are left out
        self._open: IO[bytes] | None = None
        self._header = [bytearray(), bytearray()]
        self._disposition = b""
        self._field = ""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": self.close,
            "on_header_field": lambda data, start, end: self._more_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._more_header(1, data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_end": self._end,
        }

    def take(self, parser: MultipartParser, batch: bytes) -> None:
        self._received += len(batch)
        if self._received > self._most + FORM_SLACK:
            raise TooLarge(f"the upload is larger than {self._most:,} bytes")
        parser.write(batch)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def finish(self, most: int) -> ReceivedUpload:
        """The upload, once the form is complete. Raises `BadRequest` that names what is missing."""
        if not self._ended:
            raise BadRequest("the multipart form is cut off")
        if self._archive.exists():
            if self._files:
                raise BadRequest("send either files or one archive, not both", param="archive")
            archive.unpack(self._archive, self._folder, most)
            self._archive.unlink()
        elif not self._files:
            raise BadRequest("the adapter is missing: send files, or one archive", param="files")
        elif not {CONFIG, WEIGHTS} <= self._files:
            raise BadRequest(describe_missing(self._files), param="files")
        return ReceivedUpload(None if self._name is None else self._name.decode(errors="replace"), self._folder)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._field = ""
        self._disposition = b""

    def _more_header(self, which: int, data: bytes) -> None:
        self._header[which] += data
        if len(self._header[which]) > LONGEST_FIELD:
            raise BadRequest("a header in the multipart form is too long")

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = [bytearray(), bytearray()]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode(errors="replace")
        file = options.get(b"filename", b"").decode(errors="replace")
        match self._field:
            case "name":
                if self._name is not None:
                    raise BadRequest("name was sent twice", param="name")
                self._name = b""
            case "archive":
                if self._archive.exists():
                    raise BadRequest("send one archive only", param="archive")
                self._open = self._archive.open("xb")
            case "files":
                self._begin_file(_file_of(file.replace("\\", "/")), file)
            case _:
                name = self._field[:LONGEST_NAME]
                raise InvalidField(f"unknown parameter: {name}", param=name, problem=UNKNOWN)

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

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._field == "name":
            self._name = (self._name or b"") + data[start:end]
            if len(self._name) > LONGEST_FIELD:
                raise BadRequest("the name is too long", param="name")
        elif self._open is not None:
            self._open.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self._ended = True


def _file_of(path: str) -> str:
    """The name under which a file of a form is kept: without folders, except for `1_Pooling/config.json`.

    Empty for other files in folders of sentence-transformers' modules: what these do is in `modules.json`.
    """
    parts = PurePosixPath(path).parts
    if len(parts) > 1 and MODULE_FOLDERS.fullmatch(parts[-2]):
        return POOLING if "/".join(parts[-2:]) == POOLING else ""
    return parts[-1] if parts else ""
