"""`/v1/files`: OpenAI's files, for training data. A file belongs to the key that uploaded it; others get 404.

It needs an admin key, as everything does that writes to the server's disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import IO, Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from lora_serve.api.auth import Administrator
from lora_serve.api.fine_tuning.file_store import FINE_TUNE, ID, FileStore, StoredFile
from lora_serve.api.fine_tuning.file_upload import ANCHOR, LONGEST_EXPIRY, SECONDS, SHORTEST_EXPIRY, FileForm
from lora_serve.api.multipart import receive_form
from lora_serve.api.openapi import errors
from lora_serve.api.request_record import Change, record_of
from lora_serve.api.services import ServicesDep
from lora_serve.api.upload import staging_folder
from lora_serve.errors import BadRequest

router = APIRouter(prefix="/v1", tags=["files"])

MOST_LISTED = 10_000
READ = 1 << 18  # bytes of a file's content that are sent at once

FileId = Annotated[str, InPath(description="the file's id")]

_FORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "purpose": {"type": "string", "enum": [FINE_TUNE]},
        ANCHOR: {"type": "string", "enum": ["created_at"]},
        SECONDS: {"type": "integer", "minimum": SHORTEST_EXPIRY, "maximum": LONGEST_EXPIRY},
        "file": {"type": "string", "format": "binary"},
    },
    "required": ["purpose", "file"],
    "additionalProperties": False,
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_CONTENT = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


class FileObject(BaseModel):
    """OpenAI's file object. `status` is `error` if the file is damaged on the server's disk."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed", "error"]
    status_details: str | None


class FileList(BaseModel):
    """A page of files; `after=<last_id>` asks for the next one."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedFile(BaseModel):
    """The id of the file that was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def is_file_upload(method: str, path: str) -> bool:
    """Whether a request body is a file, which is streamed to disk under its own size limit."""
    return method == "POST" and path == "/v1/files"


@router.post("/files", openapi_extra=_BODY, responses=errors(507))
async def upload_file(request: Request, services: ServicesDep, caller: Administrator) -> FileObject:
    """Upload training data, which is checked line by line: chat, completion or preference examples as JSONL."""
    engine, files = services.engine, services.files
    await asyncio.to_thread(files.open)
    async with staging_folder(services.staging) as root:
        with files.reserve(caller.owner) as reserve:
            form = FileForm(root / "file", services.config.max_file_size, reserve)
            await receive_form(request, form, lambda: engine.stats.running > 0)
            file = await _to_its_end(lambda: _keep(files, form, caller.owner))
    record_of(request.scope).changes.append(Change("upload-file", file.id, file.sha256))
    return _shown(files, file)


@router.get("/files")
async def list_files(
    services: ServicesDep,
    caller: Administrator,
    purpose: Annotated[str | None, Query(description="of this purpose only")] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED,
    order: Annotated[Literal["asc", "desc"], Query(description="by time of upload")] = "desc",
    after: Annotated[str | None, Query(description="id of the last file of the page before")] = None,
) -> FileList:
    """This key's files, newest first."""
    if after is not None and not ID.fullmatch(after):
        raise BadRequest("after must be the id of a file", param="after")

    def page() -> FileList:
        found = [each for each in services.files.list(caller.owner) if purpose in (None, each.purpose)]
        if order == "desc":
            found.reverse()
        if after is not None:  # which may have been deleted meanwhile: ids are in the order of the uploads
            found = [each for each in found if (each.id > after if order == "asc" else each.id < after)]
        data = [_shown(services.files, each) for each in found[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return FileList(data=data, has_more=len(found) > limit, first_id=first, last_id=last)

    return await asyncio.to_thread(page)


@router.get("/files/{file_id}", responses=errors(404))
async def retrieve_file(file_id: FileId, services: ServicesDep, caller: Administrator) -> FileObject:
    """Describe a file."""
    return await asyncio.to_thread(lambda: _shown(services.files, services.files.find(file_id, caller.owner)))


@router.get("/files/{file_id}/content", response_class=Response, responses={200: _CONTENT, **errors(404, 409, 507)})
async def file_content(file_id: FileId, services: ServicesDep, caller: Administrator) -> StreamingResponse:
    """A file's content, as it was uploaded."""
    file, content = await asyncio.to_thread(services.files.read, file_id, caller.owner)
    headers = {
        "Content-Length": str(file.bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(_pieces(content), media_type="application/octet-stream", headers=headers)


@router.delete("/files/{file_id}", responses=errors(404, 507))
async def delete_file(request: Request, file_id: FileId, services: ServicesDep, caller: Administrator) -> DeletedFile:
    """Delete a file."""
    file = await asyncio.to_thread(services.files.delete, file_id, caller.owner)
    record_of(request.scope).changes.append(Change("delete-file", file.id, file.sha256))
    return DeletedFile(id=file.id)


def _keep(files: FileStore, form: FileForm, tenant: str) -> StoredFile:
    received = form.finish()
    return files.add(
        received.folder,
        tenant=tenant,
        filename=received.filename,
        purpose=FINE_TUNE,
        sha256=received.sha256,
        expires_after=received.expires_after,
        kind=received.checked.kind,
        examples=received.checked.examples,
    )


async def _to_its_end(work: Callable[[], StoredFile]) -> StoredFile:
    """Run something in a thread. If the request is cancelled, wait for it all the same: its folder is in use."""
    running = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def _shown(files: FileStore, file: StoredFile) -> FileObject:
    damaged = files.is_damaged(file)
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
        status="error" if damaged else "processed",
        status_details="the file is damaged on the server's disk; upload it again" if damaged else None,
    )


async def _pieces(content: IO[bytes]) -> AsyncIterator[bytes]:
    with content:
        while piece := await asyncio.to_thread(content.read, READ):
            yield piece
