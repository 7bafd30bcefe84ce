"""`GET /v1/models`: the base model, then every adapter that the caller may use."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter

from lora_serve.api.auth import Authorized
from lora_serve.api.caller import Caller
from lora_serve.api.openai.documented_bodies import ModelCard, ModelList
from lora_serve.api.openai.preprocess import ModelNotFound, base_names, engine_info, without_base
from lora_serve.api.openapi import errors
from lora_serve.api.services import Services, ServicesDep
from lora_serve.errors import AdapterNotFound
from lora_serve.messages import AdapterInfo, DescribeAdapter, EngineInfo, ListAdapters
from lora_serve.names import adapter_broken

router = APIRouter(tags=["openai"])


@router.get("/v1/models", response_model=ModelList)
async def models(services: ServicesDep, caller: Authorized) -> dict[str, Any]:
    """List the base model and the adapters that this key may use."""
    info = engine_info(services)
    found = msgspec.convert(await services.engine.call(ListAdapters()), list[AdapterInfo])
    shown = [_adapter(info, adapter) for adapter in found if caller.may_use(adapter.name) and adapter.broken is None]
    return {"object": "list", "data": [_base(info), *shown]}


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=errors(404))
async def model(model: str, services: ServicesDep, caller: Authorized) -> dict[str, Any]:
    """Describe the base model or one adapter, named as in the list or as base:adapter."""
    info = engine_info(services)
    if model in base_names(services):
        return _base(info)
    return _adapter(info, await _find(without_base(model, services), services, caller))


async def _find(name: str, services: Services, caller: Caller) -> AdapterInfo:
    try:
        if caller.may_use(name):
            found = msgspec.convert(await services.engine.call(DescribeAdapter(name)), AdapterInfo)
            if found.broken is not None:
                raise adapter_broken(name, found.broken)
            return found
    except AdapterNotFound:
        pass
    raise ModelNotFound(f"model {name[:100]} does not exist", param="model")


def _base(info: EngineInfo) -> dict[str, Any]:
    return {
        "id": info.model,
        "object": "model",
        "created": info.created,
        "owned_by": "lora-serve",
        "root": info.root,
        "parent": None,
        "max_model_len": info.max_model_len,
    }


def _adapter(info: EngineInfo, adapter: AdapterInfo) -> dict[str, Any]:
    newest = adapter.versions[0]
    return {
        "id": adapter.name,
        "object": "model",
        "created": int(newest.created),
        "owned_by": "lora-serve",
        "root": f"{adapter.name}@{newest.digest}",
        "parent": info.model,
        "max_model_len": info.max_model_len,
    }
