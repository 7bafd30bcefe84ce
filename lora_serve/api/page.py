"""The page at `/`, the API reference at `/docs`, and their files in `lora_serve/web`: one static bundle, read at start.

It contains nothing secret, so it needs no key; what it shows it asks the API for, with the key that its user enters.
Files are served below a folder named by the digest of all of them, so that browsers keep them for good and ask again
for the two documents only. What is not in the bundle has no path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import NamedTuple

from fastapi import APIRouter, HTTPException, Request, Response

router = APIRouter(include_in_schema=False)

DOCUMENTS = {"/": "index.html", "/docs": "docs.html"}
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# Only files of this server run and are fetched; no page of another origin may frame this one or open it as its own.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class WebFile(NamedTuple):
    """A file of the bundle as it is sent."""

    content: bytes
    media_type: str
    etag: str
    cache_control: str


@cache
def bundle() -> Mapping[str, WebFile]:
    """Every file of the page by its URL path."""
    found = dict(_read(files("lora_serve") / "web", ""))
    folder = f"web/{_digest(*found, *found.values())}/"
    served: dict[str, WebFile] = {}
    for name, content in found.items():
        media_type = MEDIA_TYPES["." + name.rpartition(".")[2]]
        served[f"/{folder}{name}"] = WebFile(content, media_type, _etag(content), "public, max-age=31536000, immutable")
    for path, name in DOCUMENTS.items():
        content = found[name].replace(b'="web/', f'="{folder}'.encode())
        served[path] = WebFile(content, MEDIA_TYPES[".html"], _etag(content), "no-cache")
        del served[f"/{folder}{name}"]
    return MappingProxyType(served)


@router.get("/")
@router.get("/docs")
@router.get("/web/{name:path}")
async def web_file(request: Request) -> Response:
    """A file of the page; 304 if the browser has it."""
    file = bundle().get(request.url.path)
    if file is None:
        raise HTTPException(404, "there is no such page")
    headers = {"ETag": file.etag, "Cache-Control": file.cache_control, **SECURITY_HEADERS}
    if file.etag in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _read(folder: Traversable, prefix: str) -> list[tuple[str, bytes]]:
    """Files below a folder, with their paths in it, sorted."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
        elif f".{entry.name.rpartition('.')[2]}" in MEDIA_TYPES:
            found.append((prefix + entry.name, entry.read_bytes()))
    return found


def _digest(*parts: str | bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()[:16]


def _etag(content: bytes) -> str:
    return f'"{_digest(content)}"'
