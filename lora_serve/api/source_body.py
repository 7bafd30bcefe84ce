"""JSON bodies of the publishing routes, which name an adapter in one of the operator's sources."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request

from lora_serve.api.caller import Caller
from lora_serve.api.error_handlers import Forbidden
from lora_serve.api.json_body import decode
from lora_serve.api.multipart import unknown_field
from lora_serve.api.source_fetches import SourceFetches
from lora_serve.api.upload import ReceivedUpload
from lora_serve.errors import BadRequest, TooLarge
from lora_serve.names import NAME_PATTERN

LONGEST_BODY = 8192
LONGEST_SOURCE = 1024
DIGEST = "[0-9a-f]{8,64}"
TRUST = "let the adapter's serve.yaml count: its system prompt, chat template, tokens and defaults"


@asynccontextmanager
async def receive_from_source(
    request: Request, sources: SourceFetches, caller: Caller, name: str | None, check_sent: Callable[[str | None], Any]
) -> AsyncIterator[ReceivedUpload]:
    """Fetch the adapter that a JSON body names; its folder exists as long as the context.

    Args:
        name: of the adapter, where it is in the path.
        check_sent: called with the name in the body before anything is fetched; raises what is wrong with it.

    A caller of some adapters only may fetch only what has such a name in the source as well: beside them may be other
    tenants'.

    Raises: `BadRequest`, `Forbidden`; the `ServeError` for which the adapter cannot be had.
    """
    body = decode(await _read(request))
    if not isinstance(body, dict):
        raise BadRequest("the body must be an object")
    for field, value in body.items():
        if field not in ("name", "source", "digest", "trust_settings"):
            raise unknown_field(field)
        if field == "trust_settings":
            if not isinstance(value, bool):
                raise BadRequest("trust_settings must be true or false", param=field)
        elif not isinstance(value, str):
            raise BadRequest(f"{field} must be a string", param=field)
    if not (source := body.get("source")) or len(source) > LONGEST_SOURCE:
        raise BadRequest(f"source must be a string of 1 to {LONGEST_SOURCE} characters", param="source")
    digest = body.get("digest", "")
    if digest and not re.fullmatch(DIGEST, digest):
        raise BadRequest("digest must be 8 to 64 hexadecimal digits, in lower case", param="digest")
    sent = body.get("name")
    wanted = name or sent or ""
    if "/" not in source and not wanted:
        raise BadRequest("missing parameter: name", param="name")
    location = sources.find(source, wanted)
    if not caller.may_use(location.path):
        raise Forbidden("this key may not fetch that adapter", param="source")
    check_sent(sent)
    async with sources.fetch_for_admin(location, wanted) as folder:
        yield ReceivedUpload(sent, folder, location.label, digest, body.get("trust_settings", False))


def source_schema(*, name: bool) -> dict[str, Any]:
    """OpenAPI schema of such a body."""
    fields: dict[str, Any] = {"name": {"type": "string", "pattern": f"^{NAME_PATTERN}$"}} if name else {}
    fields |= {
        "source": {
            "type": "string",
            "maxLength": LONGEST_SOURCE,
            "description": "NAME of a source of the server, NAME/PATH in it, or a URL in it",
        },
        "digest": {"type": "string", "pattern": f"^{DIGEST}$", "description": "refuse any other version"},
        "trust_settings": {"type": "boolean", "description": TRUST},
    }
    return {"type": "object", "properties": fields, "required": ["source"], "additionalProperties": False}


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_BODY:
            raise TooLarge(f"the body is larger than {LONGEST_BODY:,} bytes")
    return bytes(body)
