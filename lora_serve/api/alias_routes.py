"""Admin routes of aliases: names that stand for adapters or versions of them, for canaries, A/B tests and roll-back.

Every key may list and show the aliases whose names it may use; changing one needs an admin key that may use its targets
as well, those before the change included.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as InPath
from pydantic import Field, field_validator

from lora_serve.api.auth import Administrator, Authorized
from lora_serve.api.caller import Caller
from lora_serve.api.error_handlers import Forbidden
from lora_serve.api.etags import Conditions, KnownTags, tagged
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.schemas import Strict
from lora_serve.api.openapi import UNCHANGED, documented
from lora_serve.api.request_record import Change, record_of
from lora_serve.api.services import Services, ServicesDep
from lora_serve.api.visible_aliases import adapter_of, as_seen_by, usable_aliases
from lora_serve.errors import AdapterNotFound
from lora_serve.messages import AliasInfo, AliasTarget, DeleteAlias, DescribeAlias, PutAlias
from lora_serve.names import (
    MOST_TARGETS,
    MOST_WEIGHT,
    STICKY_PATTERN,
    adapter_not_found,
    alias_not_found,
    check_name,
)
from lora_serve.precondition import Precondition

router = APIRouter(prefix="/v1", tags=["aliases"], route_class=JSONRoute)


class Target(Strict):
    """An adapter, or NAME@VERSION, and its share of the requests by weight; at weight 0 a version is only kept."""

    adapter: Annotated[str, Field(min_length=1, max_length=200)]
    weight: Annotated[float, Field(ge=0, le=MOST_WEIGHT)] = 1.0


class Alias(Strict):
    """What an alias stands for.

    `sticky`: what keeps a client on a target, `user` (the request's field) or `header:NAME`; without it, and for
    requests that lack it, every API call is on its own.
    """

    targets: Annotated[list[Target], Field(min_length=1, max_length=MOST_TARGETS, fail_fast=True)]
    sticky: Annotated[str, Field(pattern=f"^{STICKY_PATTERN}$")] | None = None

    @field_validator("targets")
    @classmethod
    def _different_ones(cls, targets: list[Target]) -> list[Target]:
        if len({target.adapter for target in targets}) < len(targets):
            raise ValueError("two targets are the same adapter")
        if not any(target.weight for target in targets):
            raise ValueError("no target has a weight above 0")
        return targets


class AliasList(msgspec.Struct, frozen=True):
    """All aliases that a key may use, by name."""

    object: Literal["list"]
    data: list[AliasInfo]


class DeletedAlias(msgspec.Struct, frozen=True):
    """The alias that was deleted."""

    name: str
    deleted: Literal[True]


AliasName = Annotated[str, InPath(description="the alias")]


def _usable_alias(name: AliasName, caller: Authorized) -> str:
    """The alias in the path. Raises AdapterNotFound if the caller may not use it, as if it did not exist."""
    if not caller.may_use(name):
        raise alias_not_found(name)
    return name


UsableAlias = Annotated[str, Depends(_usable_alias)]


@router.get("/aliases", responses=documented(AliasList))
async def list_aliases(services: ServicesDep, caller: Authorized) -> dict[str, Any]:
    """All aliases that this key may use, sorted by name, with those of their targets that it may use."""
    found = await usable_aliases(services, caller)
    return {"object": "list", "data": [msgspec.to_builtins(as_seen_by(caller, info)) for info in found]}


@router.get("/aliases/{name}", response_class=Response, responses=documented(AliasInfo, 404, etag=True) | UNCHANGED)
async def show_alias(name: UsableAlias, services: ServicesDep, caller: Authorized, known: KnownTags) -> Response:
    """One alias: its targets that this key may use, with whole digests of versions, weights, what it sticks to."""
    info = as_seen_by(caller, msgspec.convert(await services.engine.call(DescribeAlias(name)), AliasInfo))
    return tagged(msgspec.to_builtins(info), info.etag, known)


@router.put("/aliases/{name}", response_class=Response, responses=documented(AliasInfo, 404, 409, 412, 507, etag=True))
async def put_alias(
    name: AliasName,
    body: Alias,
    request: Request,
    services: ServicesDep,
    caller: Administrator,
    conditions: Conditions,
) -> Response:
    """Let a name stand for these adapters from now on, all at once. Versions that it names are kept until none does."""
    caller.check_may_publish(check_name(name))
    targets = [AliasTarget(target.adapter, target.weight) for target in body.targets]
    for number, target in enumerate(targets):
        adapter = adapter_of(target.adapter)
        if not caller.may_use(adapter):
            hidden = adapter_not_found(adapter)
            raise AdapterNotFound(hidden.message + services.sources.describe(), param=f"targets.{number}.adapter")
    names = [adapter_of(target.adapter) for target in targets]
    await services.sources.fetch_missing(names, caller.name)
    conditions = await _check_may_change(name, services, caller, conditions)
    changes = record_of(request.scope).changes
    changes.append(Change("alias", name, targets=_described(targets)))
    try:
        info = await services.engine.call(PutAlias(name, targets, body.sticky or "", conditions))
    except AdapterNotFound as error:
        if error.message not in [adapter_not_found(each).message for each in names]:  # only a version is missing
            raise
        raise AdapterNotFound(error.message + services.sources.describe(), param=error.param) from None
    stored = msgspec.convert(info, AliasInfo)
    changes[-1] = Change("alias", name, stored.etag, _described(stored.targets))
    return tagged(info, stored.etag)


@router.delete("/aliases/{name}", responses=documented(DeletedAlias, 404, 412, 507))
async def delete_alias(
    name: UsableAlias, request: Request, services: ServicesDep, caller: Administrator, conditions: Conditions
) -> dict[str, Any]:
    """Remove an alias; its targets stay, but for versions that only it kept."""
    conditions = await _check_may_change(name, services, caller, conditions)
    record_of(request.scope).changes.append(Change("unalias", name))
    await services.engine.call(DeleteAlias(name, conditions))
    return {"name": name, "deleted": True}


async def _check_may_change(name: str, services: Services, caller: Caller, conditions: Precondition) -> Precondition:
    """Check that a key may use what an alias stands for now; returns its conditions, with that it still does so.

    Raises: `Forbidden`, PreconditionFailed.
    """
    if caller.adapters is None:
        return conditions
    try:
        info = msgspec.convert(await services.engine.call(DescribeAlias(name)), AliasInfo)
    except AdapterNotFound:
        conditions.check(None)
        return Precondition(none_match=("*",))
    if info.broken is not None or not all(caller.may_use(adapter_of(target.adapter)) for target in info.targets):
        raise Forbidden("this key may not use all that the alias stands for now", param="name")
    conditions.check(info.etag)
    return Precondition(match=(info.etag,))


def _described(targets: list[AliasTarget]) -> str:
    return ", ".join(f"{target.adapter}:{target.weight:g}" for target in targets)
