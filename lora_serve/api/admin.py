"""Admin routes: inspect, publish, list, load, evict, pin and delete adapters.

Every key may list and show the adapters that it may use; everything else needs an admin key, and is about the adapters
that this key may use. Responses are the
engine's `AdapterInfo` and `Inspection`. Uploads are received by `upload.py` and checked by the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response

from lora_serve.api.auth import AdapterName, AdministeredAdapter, Administrator, Authorized, authorize
from lora_serve.api.caller import Caller
from lora_serve.api.content_type import is_json
from lora_serve.api.etags import Conditions, KnownTags, adapter_etag, tagged
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.preprocess import similar_names
from lora_serve.api.openapi import UNCHANGED, documented
from lora_serve.api.request_record import Change, record_of
from lora_serve.api.services import Services, ServicesDep
from lora_serve.api.source_body import TRUST, receive_from_source, source_schema
from lora_serve.api.upload import ReceivedUpload, receive_upload
from lora_serve.api.uploaded_settings import check_uploaded_settings
from lora_serve.api.visible_adapters import usable_adapters
from lora_serve.errors import AdapterNotFound, BadRequest
from lora_serve.messages import (
    AdapterInfo,
    DeleteAdapter,
    DescribeAdapter,
    EvictAdapter,
    Inspect,
    Inspection,
    LoadAdapter,
    PinAdapter,
    Publish,
)
from lora_serve.names import NAME_PATTERN, check_name

router = APIRouter(prefix="/v1", tags=["adapters"], route_class=JSONRoute)

Limit = Annotated[int | None, Query(ge=1, le=1000, description="how many; else all")]
After = Annotated[str, Query(max_length=64, description="the name after which they come")]
Info = dict[str, Any]  # JSON form of `messages.AdapterInfo` or `Inspection`


def _upload_schema(*required: str, name: bool = True) -> dict[str, Any]:
    """OpenAPI schema of an upload body, which is streamed instead of parsed by FastAPI."""
    binary = {"type": "string", "format": "binary"}
    fields: dict[str, Any] = {"name": {"type": "string", "pattern": f"^{NAME_PATTERN}$"}} if name else {}
    files = fields | {"files": {"type": "array", "items": binary}, "archive": binary}
    files["trust_settings"] = {"type": "string", "enum": ["true", "false"], "description": TRUST}
    files["settings"] = {"type": "string", "description": "the text of a serve.yaml, in place of the adapter's own"}
    schema = {"type": "object", "properties": files, "required": list(required), "additionalProperties": False}
    schema["oneOf"] = [{"required": ["files"]}, {"required": ["archive"]}]
    content = {"multipart/form-data": {"schema": schema}, "application/json": {"schema": source_schema(name=name)}}
    return {"requestBody": {"required": True, "content": content}}


class AdapterList(msgspec.Struct, frozen=True):
    """Adapters that a key may use, by name; `last_id` is what `after` takes for the next ones."""

    object: Literal["list"]
    data: list[AdapterInfo]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedAdapter(msgspec.Struct, frozen=True):
    """The name that was deleted."""

    name: str
    deleted: Literal[True]


def _receive(
    request: Request,
    services: Services,
    caller: Caller,
    check_sent: Callable[[str | None], Any],
    name: str | None = None,
) -> AbstractAsyncContextManager[ReceivedUpload]:
    """The upload in a request's body, or what its body names in a source.

    Args:
        check_sent: raises what is wrong with the name in the body; an upload's is known, and checked, at its end only.
        name: of the adapter, from the path.
    """
    engine = services.engine
    if is_json(request.headers.get("Content-Type") or "?"):
        return receive_from_source(request, services.sources, caller, name, check_sent)
    return receive_upload(request, services.staging, services.config.max_adapter_size, lambda: engine.stats.running > 0)


def is_upload(method: str, path: str) -> bool:
    """Whether a request body is an adapter upload, which is streamed to disk under its own size limit."""
    if method == "POST":
        return path in ("/v1/adapters", "/v1/adapters/inspect")
    return method == "PUT" and path.startswith("/v1/adapters/")


@router.post(
    "/adapters",
    status_code=201,
    openapi_extra=_upload_schema("name"),
    response_class=Response,
    responses=documented(AdapterInfo, 409, 422, 507, success=201, etag=True),
)
async def publish(request: Request, services: ServicesDep, caller: Administrator) -> Response:
    """Publish an adapter under a new name: `name`, and `files` or one `archive`."""

    def check(sent: str | None) -> str:
        if sent is None:
            raise BadRequest("missing parameter: name", param="name")
        return caller.check_may_publish(check_name(sent))

    async with _receive(request, services, caller, check) as upload:
        name = check(upload.name)
        return await _publish(request, services, Publish(name, str(upload.folder)), upload)


@router.post("/adapters/inspect", openapi_extra=_upload_schema(name=False), responses=documented(Inspection, 422, 507))
async def inspect(request: Request, services: ServicesDep, caller: Administrator) -> Info:
    """Check these `files` or this `archive` as publishing would and return the report; nothing is stored."""

    def check(sent: str | None) -> None:
        if sent is not None:
            raise BadRequest("name is not allowed here: nothing is published", param="name")

    async with _receive(request, services, caller, check) as upload:
        check(upload.name)
        await check_uploaded_settings(upload, services, caller)
        return await _call(request, services, Inspect(str(upload.folder), upload.trust_settings))


@router.put(
    "/adapters/{name}",
    status_code=201,
    openapi_extra=_upload_schema(),
    response_class=Response,
    responses=documented(AdapterInfo, 409, 412, 422, 507, success=201, etag=True),
)
async def publish_version(
    name: AdapterName, request: Request, services: ServicesDep, caller: Administrator, conditions: Conditions
) -> Response:
    """Publish a new version of an adapter, or its first. Running requests finish on the version they started with."""
    caller.check_may_publish(check_name(name))

    def check(sent: str | None) -> None:
        if sent not in (None, name):
            raise BadRequest("name differs from the one in the path", param="name")

    async with _receive(request, services, caller, check, name) as upload:
        check(upload.name)
        operation = Publish(name, str(upload.folder), replace=True, precondition=conditions)
        return await _publish(request, services, operation, upload)


@router.get("/adapters", responses=documented(AdapterList))
async def list_adapters(
    services: ServicesDep, caller: Authorized, limit: Limit = None, after: After = ""
) -> dict[str, Any]:
    """The adapters that this key may use, sorted by name: all of them, or so many after a name."""
    found = await usable_adapters(services, caller, after, None if limit is None else limit + 1)
    shown = found[:limit]
    ends = {"first_id": shown[0].name, "last_id": shown[-1].name} if shown else {"first_id": None, "last_id": None}
    data = [msgspec.to_builtins(info) for info in shown]
    return {"object": "list", "data": data, **ends, "has_more": len(found) > len(shown)}


@router.get("/adapters/{name}", response_class=Response, responses=documented(AdapterInfo, 404, etag=True) | UNCHANGED)
async def show(
    name: AdapterName, request: Request, services: ServicesDep, caller: Authorized, known: KnownTags
) -> Response:
    """One adapter: its versions, the tiers they are in, their sizes, and the report and settings of each."""
    info = await _call(request, services, DescribeAdapter(caller.check_may_use(name)))
    return tagged(info, adapter_etag(info), known)


@router.post("/adapters/{name}/load", responses=documented(AdapterInfo, 404, 422))
async def load(name: AdministeredAdapter, request: Request, services: ServicesDep) -> Info:
    """Load an adapter into memory ahead of the first request."""
    return await _change(request, services, "load", LoadAdapter(name))


@router.post("/adapters/{name}/evict", responses=documented(AdapterInfo, 404, 409))
async def evict(name: AdministeredAdapter, request: Request, services: ServicesDep) -> Info:
    """Evict an adapter from memory once no request uses it; it stays published."""
    return await _change(request, services, "evict", EvictAdapter(name))


@router.post("/adapters/{name}/pin", responses=documented(AdapterInfo, 404, 409, 422))
async def pin(name: AdministeredAdapter, request: Request, services: ServicesDep) -> Info:
    """Load an adapter and exclude it from LRU eviction."""
    return await _change(request, services, "pin", PinAdapter(name, pinned=True))


@router.post("/adapters/{name}/unpin", responses=documented(AdapterInfo, 404))
async def unpin(name: AdministeredAdapter, request: Request, services: ServicesDep) -> Info:
    """Allow an adapter to be evicted again."""
    return await _change(request, services, "unpin", PinAdapter(name, pinned=False))


@router.delete("/adapters/{name}", responses=documented(DeletedAdapter, 404, 409, 412))
async def delete(
    name: AdministeredAdapter, request: Request, services: ServicesDep, conditions: Conditions
) -> dict[str, Any]:
    """Unlist an adapter now; its memory and files are freed when the last request that uses it has ended."""
    record_of(request.scope).changes.append(Change("delete", name))
    await _call(request, services, DeleteAdapter(name, conditions))
    return {"name": name, "deleted": True}


async def _publish(request: Request, services: Services, operation: Publish, upload: ReceivedUpload) -> Response:
    await check_uploaded_settings(upload, services, authorize(request))
    operation = msgspec.structs.replace(
        operation, source=upload.source, digest=upload.digest, trust_settings=upload.trust_settings
    )
    info = await _change(request, services, "publish", operation)
    return tagged(info, adapter_etag(info), status=201)


async def _change(
    request: Request, services: Services, action: str, operation: Publish | LoadAdapter | EvictAdapter | PinAdapter
) -> Info:
    """Run an operation that changes an adapter, and record it for the audit log, with the version that it is about."""
    changes = record_of(request.scope).changes
    changes.append(Change(action, operation.name))
    info = await _call(request, services, operation)
    changes[-1] = Change(action, operation.name, info["versions"][0]["digest"])
    return info


async def _call(
    request: Request,
    services: Services,
    operation: Publish | Inspect | DescribeAdapter | LoadAdapter | EvictAdapter | PinAdapter | DeleteAdapter,
) -> Info:
    try:
        info: Info = await services.engine.call(operation)
    except AdapterNotFound as error:
        if isinstance(operation, Publish | Inspect):
            raise
        similar = await similar_names(operation.name, services, authorize(request))
        raise AdapterNotFound(error.message + similar, param=error.param) from None
    return info
