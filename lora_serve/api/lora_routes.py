"""Routes that load and unload adapters from folders on the server: vLLM's under /v1, and SGLang's at the root.

Loading publishes a copy of the folder. Unloading removes that copy and leaves the folder; an upload, whose only copy is
in the store, is evicted and no longer listed, until it is loaded or published again.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field

from lora_serve.adapters import archive
from lora_serve.api.auth import Administrator
from lora_serve.api.caller import Caller
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.preprocess import base_names, engine_info
from lora_serve.api.openai.schemas import Strict
from lora_serve.api.openapi import errors
from lora_serve.api.request_record import Change, record_of
from lora_serve.api.services import Services, ServicesDep
from lora_serve.api.upload import staging_folder
from lora_serve.api.visible_adapters import usable_adapters
from lora_serve.errors import AdapterExists, BadRequest, ServeError
from lora_serve.messages import DeleteAdapter, PinAdapter, Publish, UnloadAdapter
from lora_serve.names import NAME_PATTERN, check_name

router = APIRouter(tags=["adapters"], route_class=JSONRoute)

NewName = Annotated[str, Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})]  # checked by `check_name`


class LoadLora(Strict):
    """Body of vLLM's `load_lora_adapter`. `is_3d_lora_weight` has no effect: the format is read from the files."""

    lora_name: NewName
    lora_path: str
    load_inplace: bool = False
    base_model_name: str | None = None
    is_3d_lora_weight: bool = False


class UnloadLora(Strict):
    """Body of vLLM's `unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None


class LoadSGLangLora(Strict):
    """Body of SGLang's `load_lora_adapter`."""

    lora_name: NewName
    lora_path: str
    pinned: bool = False


class UnloadSGLangLora(Strict):
    """Body of SGLang's `unload_lora_adapter`."""

    lora_name: str


class SGLangLoras(Strict):
    """SGLang's response. `loaded_adapters`: what the adapters' names stand for, name@digest."""

    success: bool = True
    error_message: str = ""
    loaded_adapters: dict[str, str]


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=errors(409, 422, 507))
async def load_lora_adapter(body: LoadLora, request: Request, services: ServicesDep, caller: Administrator) -> str:
    """Publish an adapter from a folder on the server, which must be below one of --adapter-roots."""
    base = body.base_model_name
    if base is not None and base not in base_names(services):
        raise BadRequest(f"the base of this server is {engine_info(services).model}", param="base_model_name")
    record_of(request.scope).changes.append(Change("publish", body.lora_name))
    await _load(body.lora_name, body.lora_path, services, caller, replace=body.load_inplace)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=errors(404))
async def unload_lora_adapter(body: UnloadLora, request: Request, services: ServicesDep, caller: Administrator) -> str:
    """Take an adapter out of memory and of the list of models. Its folder, or what was uploaded, stays."""
    record_of(request.scope).changes.append(Change("unload", body.lora_name))
    await _unload(body.lora_name, services, caller)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


@router.post("/load_lora_adapter", responses=errors(409, 422, 507))
async def load_sglang_lora(
    body: LoadSGLangLora, request: Request, services: ServicesDep, caller: Administrator
) -> SGLangLoras:
    """Publish an adapter from a folder on the server, which must be below one of --adapter-roots."""
    record_of(request.scope).changes.append(Change("publish", body.lora_name))
    await _load(body.lora_name, body.lora_path, services, caller, replace=False)
    if body.pinned:
        record_of(request.scope).changes.append(Change("pin", body.lora_name))
        try:
            await services.engine.call(PinAdapter(body.lora_name, pinned=True))
        except ServeError:
            await services.engine.call(DeleteAdapter(body.lora_name))
            raise
    return await _list(services, caller)


@router.post("/unload_lora_adapter", responses=errors(404))
async def unload_sglang_lora(
    body: UnloadSGLangLora, request: Request, services: ServicesDep, caller: Administrator
) -> SGLangLoras:
    """Take an adapter out of memory and of the list of models. Its folder, or what was uploaded, stays."""
    record_of(request.scope).changes.append(Change("unload", body.lora_name))
    await _unload(body.lora_name, services, caller)
    return await _list(services, caller)


async def _load(name: str, path: str, services: Services, caller: Caller, *, replace: bool) -> None:
    caller.check_may_publish(check_name(name, "lora_name"), "lora_name")
    roots = [root.resolve() for root in services.config.adapter_roots]
    source = await asyncio.to_thread(_resolve_below_roots, path, roots)
    async with staging_folder(services.staging) as folder:
        await asyncio.to_thread(archive.copy, source, folder, roots, services.config.max_adapter_size)
        try:
            await services.engine.call(Publish(name, str(folder), replace=replace, source=str(source), local=True))
        except AdapterExists as error:
            hint = "; load_inplace: true replaces an adapter" if not replace and "exists" in error.message else ""
            raise AdapterExists(error.message.partition(";")[0] + hint, param="lora_name") from None


async def _unload(name: str, services: Services, caller: Caller) -> None:
    await services.engine.call(UnloadAdapter(caller.check_may_use(name)))


async def _list(services: Services, caller: Caller) -> SGLangLoras:
    found = await usable_adapters(services, caller)
    return SGLangLoras(
        loaded_adapters={info.name: f"{info.name}@{info.versions[0].digest}" for info in found if info.broken is None}
    )


def _resolve_below_roots(path: str, roots: list[Path]) -> Path:
    """The folder `path` with links resolved, if it is below one of the roots. Raises `BadRequest`."""
    problem = BadRequest("lora_path must be a folder below one of the server's --adapter-roots", param="lora_path")
    try:
        source = Path(path).resolve()
        if not any(source.is_relative_to(root) for root in roots) or not source.is_dir():
            raise problem
    except (OSError, ValueError):
        raise problem from None
    return source
