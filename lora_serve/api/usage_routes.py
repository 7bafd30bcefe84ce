"""`GET /v1/usage`: requests and tokens by key, adapter and day."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel

from lora_serve.api.auth import Authorized
from lora_serve.api.error_handlers import Forbidden
from lora_serve.api.services import ServicesDep
from lora_serve.errors import BadRequest

router = APIRouter(prefix="/v1", tags=["server"])

DAYS = 30  # that are shown if no first day is asked for
MOST = 10_000  # entries of a response


class UsageEntry(BaseModel):
    """What one key used of one adapter on one day; `key` is empty without keys, `adapter` for the base."""

    day: date
    key: str
    adapter: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class UsageList(BaseModel):
    """Entries by day, key and adapter; `has_more`: there are further ones, ask for fewer days."""

    object: Literal["list"] = "list"
    data: list[UsageEntry]
    has_more: bool


@router.get("/usage")
async def usage(
    services: ServicesDep,
    caller: Authorized,
    first: Annotated[date | None, Query(description="first day, in UTC (default: 30 days ago)")] = None,
    last: Annotated[date | None, Query(description="last day, in UTC (default: today)")] = None,
    key: Annotated[str | None, Query(description="of this key only")] = None,
    adapter: Annotated[str | None, Query(description="of this adapter only; empty: of the base")] = None,
) -> UsageList:
    """Requests and tokens by key, adapter and day. A key sees its own usage; one that may read metrics, everybody's."""
    last = last or datetime.now(UTC).date()
    first = first or last - timedelta(days=min(DAYS, (last - date.min).days))
    if first > last:
        raise BadRequest("first is after last", param="first")
    if not caller.sees_everything:
        if key not in (None, caller.name):
            raise Forbidden("this key may see its own usage only", param="key")
        key = caller.name
    found = await services.usage.read(first, last, key, adapter, MOST + 1)
    entries = [UsageEntry.model_validate(each._asdict()) for each in found[:MOST]]
    return UsageList(data=entries, has_more=len(found) > MOST)
