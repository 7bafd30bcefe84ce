"""Entity tags: `ETag` is the digest of an adapter's current version, or a hash of what an alias stands for.

`If-Match` and `If-None-Match` make a change conditional, which the engine decides at the moment of the change; when
reading, the latter spares an answer that the client has. Tags without quotes are accepted too.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.responses import JSONResponse

from lora_serve.precondition import ANY, Precondition

_TAG = re.compile(r'(W/)?"([^"]*)"|([^\s,"]+)')

IfMatch = Annotated[str | None, Header(description="entity tags of which it must have one; *: it must exist")]
IfNoneMatch = Annotated[str | None, Header(description="*: it must not exist yet; or tags that it must not have")]
IfNoneMatchOfReader = Annotated[str | None, Header(description="entity tags of what the client has: then 304")]


def _precondition(request: Request, if_match: IfMatch = None, if_none_match: IfNoneMatch = None) -> Precondition:
    """The conditions of a request that changes something."""
    match, none_match = _tags(request, "If-Match"), _tags(request, "If-None-Match")
    return Precondition(
        None if match is None else tuple(tag for weak, tag in match if not weak),  # the comparison is a strong one
        None if none_match is None else tuple(tag for _, tag in none_match),
    )


Conditions = Annotated[Precondition, Depends(_precondition)]


def _known_tags(request: Request, if_none_match: IfNoneMatchOfReader = None) -> tuple[str, ...]:
    """The entity tags of what a client has already."""
    return tuple(tag for _, tag in _tags(request, "If-None-Match") or ())


KnownTags = Annotated[tuple[str, ...], Depends(_known_tags)]


def is_known(etag: str, known: tuple[str, ...]) -> bool:
    """Whether a client has what has this entity tag."""
    return bool(etag) and (etag in known or ANY in known)


def etag_header(etag: str) -> dict[str, str]:
    """The response header; none for an empty tag, of what cannot be read."""
    return {"ETag": f'"{etag}"'} if etag else {}


def not_modified(etag: str) -> Response:
    """The response to a client that has this already."""
    return Response(status_code=304, headers=etag_header(etag))


def tagged(content: dict[str, Any], etag: str, known: tuple[str, ...] = (), status: int = 200) -> Response:
    """A JSON response with its entity tag, or 304 if the client has it already."""
    return not_modified(etag) if is_known(etag, known) else JSONResponse(content, status, etag_header(etag))


def adapter_etag(info: dict[str, Any]) -> str:
    """The entity tag of an adapter, from the JSON form of `AdapterInfo`; empty if it is broken."""
    return info["versions"][0]["digest"] if info["versions"] else ""


def _tags(request: Request, header: str) -> list[tuple[bool, str]] | None:
    """Entity tags of a header, each with whether it is weak; None without the header."""
    lines = request.headers.getlist(header)
    found = [_TAG.finditer(line) for line in lines]
    return [(bool(each[1]), each[2] or each[3] or "") for line in found for each in line] if lines else None
