"""Routes of the operator: inspect, publish, list, load, evict, pin and delete adapters.

Looking is for every key, at the adapters that it may use; changing needs an admin key. Bodies of answers are the
engine's own descriptions. What publishing checks is the engine's business, how an upload is received `upload.py`'s.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from fastapi import Path as InPath
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

from lora_serve.api import archive
from lora_serve.api.auth import Administrator, Authorized
from lora_serve.api.services import Injected, Services
from lora_serve.api.upload import received, staged
from lora_serve.errors import BadRequest
from lora_serve.messages import (
    AdapterInfo,
    DeleteAdapter,
    DescribeAdapter,
    EvictAdapter,
    Inspect,
    Inspection,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    Publish,
)
from lora_serve.names import check_name, unknown

router = APIRouter(prefix="/v1", tags=["adapters"])

Info = dict[str, Any]  # builtins of `messages.AdapterInfo` or `Inspection`
Name = Annotated[str, InPath(description="the adapter's published name")]


def _form(*required: str, name: bool = True) -> dict[str, Any]:
    """OpenAPI's description of an upload, which is read as a stream and not by the framework."""
    binary = {"type": "string", "format": "binary"}
    fields: dict[str, Any] = {"name": {"type": "string"}} if name else {}
    fields |= {"files": {"type": "array", "items": binary}, "archive": binary}
    schema = {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _answer(struct: type[msgspec.Struct], status: int = 200) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of an answer that is the engine's own."""
    (schema,), parts = msgspec.json.schema_components([struct], ref_template="{name}")

    def whole(node: Any) -> Any:
        if isinstance(node, list):
            return [whole(item) for item in node]
        if not isinstance(node, dict):
            return node
        return whole(parts[node["$ref"]]) if "$ref" in node else {key: whole(value) for key, value in node.items()}

    return {status: {"description": "Done", "content": {"application/json": {"schema": whole(schema)}}}}


def is_upload(method: str, path: str) -> bool:
    """Whether a request's body is an upload, which has its own cap and is not to be read into memory."""
    if method == "POST":
        return path in ("/v1/adapters", "/v1/adapters/inspect")
    return method == "PUT" and path.startswith("/v1/adapters/")


@router.post("/adapters", status_code=201, openapi_extra=_form("name"), responses=_answer(AdapterInfo, 201))
async def publish(request: Request, services: Injected, caller: Administrator) -> Info:
    """Publish an adapter under a new name: `name`, and `files` or one `archive`."""
    async with received(request, services.staging, services.config.max_adapter_size) as upload:
        if upload.name is None:
            raise BadRequest("missing parameter: name", param="name")
        return await _publish(services, check_name(upload.name), upload.folder, replace=False)


@router.post("/adapters/inspect", openapi_extra=_form(name=False), responses=_answer(Inspection))
async def inspect(request: Request, services: Injected, caller: Administrator) -> Info:
    """What publishing these `files` or this `archive` would make, with its report; nothing is stored."""
    async with received(request, services.staging, services.config.max_adapter_size) as upload:
        if upload.name is not None:
            raise BadRequest("name has no meaning here: nothing is published", param="name")
        return await _call(services, Inspect(str(upload.folder)))


@router.put("/adapters/{name}", status_code=201, openapi_extra=_form(), responses=_answer(AdapterInfo, 201))
async def publish_version(name: Name, request: Request, services: Injected, caller: Administrator) -> Info:
    """Publish a new version of an adapter, or its first. Running requests finish on the version they began with."""
    check_name(name)
    async with received(request, services.staging, services.config.max_adapter_size) as upload:
        if upload.name not in (None, name):
            raise BadRequest("name is another one than in the path", param="name")
        return await _publish(services, name, upload.folder, replace=True)


@router.get("/adapters")
async def list_adapters(services: Injected, caller: Authorized) -> dict[str, Any]:
    """All adapters that this key may use, by name."""
    found = await services.engine.call(ListAdapters())
    return {"object": "list", "data": [info for info in found if caller.may_use(info["name"])]}


@router.get("/adapters/{name}", responses=_answer(AdapterInfo))
async def show(name: Name, services: Injected, caller: Authorized) -> Info:
    """One adapter: its versions, where they are, what they take, and the report on each."""
    if not caller.may_use(name):
        raise unknown(name)
    return await _call(services, DescribeAdapter(name))


@router.post("/adapters/{name}/load")
async def load(name: Name, services: Injected, caller: Administrator) -> Info:
    """Bring an adapter into memory before it is asked for."""
    return await _call(services, LoadAdapter(name))


@router.post("/adapters/{name}/evict")
async def evict(name: Name, services: Injected, caller: Administrator) -> Info:
    """Take an adapter out of memory once nobody uses it; it stays published."""
    return await _call(services, EvictAdapter(name))


@router.post("/adapters/{name}/pin")
async def pin(name: Name, services: Injected, caller: Administrator) -> Info:
    """Load an adapter and never evict it to make room."""
    return await _call(services, PinAdapter(name, pinned=True))


@router.post("/adapters/{name}/unpin")
async def unpin(name: Name, services: Injected, caller: Administrator) -> Info:
    """Let an adapter be evicted again."""
    return await _call(services, PinAdapter(name, pinned=False))


@router.delete("/adapters/{name}")
async def delete(name: Name, services: Injected, caller: Administrator) -> dict[str, Any]:
    """Unlist an adapter now; it is gone when the last request that uses it has ended."""
    await services.engine.call(DeleteAdapter(name))
    return {"name": name, "deleted": True}


# --- vLLM's names, for sidecars that send them ------------------------------------------------------------------------


class LoadLora(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLora(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str
    lora_int_id: int | None = None


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLora, services: Injected, caller: Administrator) -> str:
    """Publish an adapter from a folder on the server, which must lie below one of the configured roots."""
    name = check_name(body.lora_name, "lora_name")
    roots = [root.resolve() for root in services.config.adapter_roots]
    source = await asyncio.to_thread(_below, body.lora_path, roots)
    async with staged(services.staging) as folder:
        await asyncio.to_thread(archive.copy, source, folder, roots, services.config.max_adapter_size)
        await _publish(services, name, folder, replace=body.load_inplace)
    return f"Success: LoRA adapter '{name}' added successfully."


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLora, services: Injected, caller: Administrator) -> str:
    """Delete an adapter by name."""
    await services.engine.call(DeleteAdapter(body.lora_name))
    return f"Success: LoRA adapter '{body.lora_name[:100]}' removed successfully."


def _below(path: str, roots: list[Path]) -> Path:
    """The folder that `path` names, if it lies below a root with all links followed. Raises `BadRequest`."""
    problem = BadRequest("lora_path must be a folder below one of the server's --adapter-roots", param="lora_path")
    try:
        source = Path(path).resolve()
        if not any(source.is_relative_to(root) for root in roots) or not source.is_dir():
            raise problem
    except (OSError, ValueError):
        raise problem from None
    return source


async def _publish(services: Services, name: str, folder: Path, *, replace: bool) -> Info:
    return await _call(services, Publish(name, str(folder), replace=replace))


async def _call(
    services: Services, operation: Publish | Inspect | DescribeAdapter | LoadAdapter | EvictAdapter | PinAdapter
) -> Info:
    info: Info = await services.engine.call(operation)
    return info
