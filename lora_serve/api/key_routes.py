"""`GET /v1/key`: what the caller's key allows, so that a client shows only what it may do."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from lora_serve.api.auth import Authorized

router = APIRouter(prefix="/v1", tags=["server"])


class KeyPermissions(BaseModel):
    """A key's name and permissions; the name is empty on a server without keys, which allows everything.

    `adapters`: names or shell patterns of those it may use; null is all. `metrics`: may read metrics and all usage.
    """

    name: str
    admin: bool
    metrics: bool
    adapters: list[str] | None


@router.get("/key")
async def key(caller: Authorized) -> KeyPermissions:
    """What the caller's key allows."""
    adapters = None if caller.adapters is None else [*caller.adapters]
    return KeyPermissions(name=caller.name, admin=caller.admin, metrics=caller.sees_everything, adapters=adapters)
