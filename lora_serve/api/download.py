"""`GET /v1/adapters/{name}/files`: the PEFT files of a version as they came, as a tar that is streamed from the store.

It needs an admin key: weights are what an adapter's owner keeps, and a key to generate with them is none to take them
away. Every file is hashed while it is sent; if it is not what was published, the connection is closed before its end.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tarfile
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Annotated

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lora_serve.api.auth import AdministeredAdapter
from lora_serve.api.etags import KnownTags, etag_header, is_known, not_modified
from lora_serve.api.openapi import ETAG, UNCHANGED, errors
from lora_serve.api.request_record import Change, record_of
from lora_serve.api.services import ServicesDep
from lora_serve.errors import AdapterBroken
from lora_serve.messages import AdapterFiles, LocateFiles

CHUNK = 1 << 20  # bytes read at once
BLOCK = tarfile.BLOCKSIZE
TAR = "application/x-tar"

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1", tags=["adapters"])

Version = Annotated[
    str | None, Query(min_length=1, max_length=64, description="beginning of a version's digest; else the newest one")
]


@router.get(
    "/adapters/{name}/files",
    response_class=Response,
    responses={
        200: {
            "description": "A tar of the files",
            "content": {TAR: {"schema": {"type": "string", "format": "binary"}}},
            **ETAG,
        },
        **UNCHANGED,
        **errors(400, 404, 409),
    },
)
async def download(
    name: AdministeredAdapter, request: Request, services: ServicesDep, known: KnownTags, version: Version = None
) -> Response:
    """The PEFT files of an adapter as they came, as a tar; the entity tag is the version's digest."""
    found = msgspec.convert(await services.engine.call(LocateFiles(name, version)), AdapterFiles)
    if is_known(found.digest, known):
        return not_modified(found.digest)
    record_of(request.scope).changes.append(Change("download", name, found.digest))
    return TarResponse(found)


class TarResponse(StreamingResponse):
    """A tar of a version's files, which are open from the beginning: whatever happens to the version, it is complete.

    Equal files make an equal tar. Raises AdapterBroken if a file cannot be opened.
    """

    def __init__(self, version: AdapterFiles) -> None:
        self._opened = ExitStack()
        self._adapter = f"adapter {version.name}"
        files = [self._open(version, path) for path in sorted(version.files)]
        length = sum(BLOCK + size + -size % BLOCK for _, _, size, _ in files) + 2 * BLOCK
        headers = {
            "Content-Length": str(length),
            "Content-Disposition": f'attachment; filename="{version.name}-{version.digest[:12]}.tar"',
        }
        super().__init__(_tar(files, self._adapter), headers=headers | etag_header(version.digest), media_type=TAR)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._opened:
            try:
                await super().__call__(scope, receive, send)
            except AdapterBroken as error:  # too late for a status: the response stays incomplete
                record_of(scope).failed(error.kind, error.reason)
                log.error("a download was ended: %s", error.message)

    def _open(self, version: AdapterFiles, path: str) -> tuple[str, IO[bytes], int, str]:
        size, digest = version.files[path]
        try:
            file = self._opened.enter_context((Path(version.folder) / path).open("rb", buffering=0))
            if os.fstat(file.fileno()).st_size == size:
                return path, file, size, digest
            reason = f"{path} has another size than was published"
        except OSError as error:
            reason = f"{path}: {error.strerror}"
        self._opened.close()
        raise AdapterBroken(f"{self._adapter} cannot be downloaded: {reason}", param="name")


async def _tar(files: list[tuple[str, IO[bytes], int, str]], adapter: str) -> AsyncGenerator[bytes, None]:
    """The tar of files, given as name, open file, size and SHA-256. Raises AdapterBroken if one has been altered."""
    for name, file, size, digest in files:
        member = tarfile.TarInfo(name)
        member.size = size
        yield member.tobuf(tarfile.GNU_FORMAT)  # sizes beyond 8 GiB need no further header
        hashed, left = hashlib.sha256(), size
        while left:
            chunk = await asyncio.to_thread(_read, file, min(CHUNK, left), hashed)
            if not chunk:
                break
            left -= len(chunk)
            yield chunk
        if left or hashed.hexdigest() != digest:
            raise AdapterBroken(f"{name} of {adapter} has been altered in the store")
        yield bytes(-size % BLOCK)
    yield bytes(2 * BLOCK)


def _read(file: IO[bytes], count: int, hashed: hashlib._Hash) -> bytes:
    chunk = file.read(count)
    hashed.update(chunk)
    return chunk
