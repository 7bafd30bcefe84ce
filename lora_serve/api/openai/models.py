"""`GET /v1/models`: the base model, then every adapter and every alias that the caller may use."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
from fastapi import APIRouter

from lora_serve.api.auth import Authorized
from lora_serve.api.openai.documented_bodies import ModelCard, ModelList
from lora_serve.api.openai.preprocess import ModelNotFound, base_names, engine_info, without_base
from lora_serve.api.openapi import errors
from lora_serve.api.services import ServicesDep
from lora_serve.api.visible_adapters import usable_adapters
from lora_serve.api.visible_aliases import as_seen_by, usable_aliases
from lora_serve.errors import AdapterNotFound
from lora_serve.messages import (
    AdapterInfo,
    AliasInfo,
    DescribeAdapter,
    DescribeAlias,
    EngineInfo,
)
from lora_serve.names import adapter_broken

router = APIRouter(tags=["openai"])


@router.get("/v1/models", response_model=ModelList)
async def models(services: ServicesDep, caller: Authorized) -> dict[str, Any]:
    """List the base model, and the adapters and aliases that this key may use."""
    info = engine_info(services)
    adapters = await usable_adapters(services, caller)
    aliases = await usable_aliases(services, caller)
    shown = [_adapter(info, each) for each in adapters if each.broken is None]
    shown += [_alias(info, as_seen_by(caller, each)) for each in aliases if each.targets]
    return {"object": "list", "data": [_base(info), *shown]}


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=errors(404))
async def model(model: str, services: ServicesDep, caller: Authorized) -> dict[str, Any]:
    """Describe the base model, one adapter or one alias, named as in the list or as base:adapter."""
    info = engine_info(services)
    if model in base_names(services):
        return _base(info)
    await services.trained.publish_checkpoint(model, caller)
    name = without_base(model, services).partition("@")[0]
    if caller.may_use(name):
        with suppress(AdapterNotFound):
            adapter = msgspec.convert(await services.engine.call(DescribeAdapter(name)), AdapterInfo)
            if adapter.broken is not None:
                raise adapter_broken(name, adapter.broken)
            return _adapter(info, adapter)
        with suppress(AdapterNotFound):
            alias = msgspec.convert(await services.engine.call(DescribeAlias(name)), AliasInfo)
            if alias.targets:
                return _alias(info, as_seen_by(caller, alias))
    raise ModelNotFound(f"model {model[:100]} does not exist", param="model")  # not what a name stands for


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


def _alias(info: EngineInfo, alias: AliasInfo) -> dict[str, Any]:
    """An alias; its root is the target with the largest weight, or itself to a key that may use none."""
    return {
        "id": alias.name,
        "object": "model",
        "created": int(alias.created),
        "owned_by": "lora-serve",
        "root": max(alias.targets, key=lambda target: target.weight).adapter if alias.targets else alias.name,
        "parent": info.model,
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
