"""What a request needs to be served: a key, and for some routes a permission of it.

An ordinary key may generate, with all or with some adapters; an admin key may also publish and delete these adapters;
reading metrics, which name all adapters, is a permission of its own. Without a key file every caller may do everything.
TLS is left to a proxy.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi import Path as InPath
from fastapi.security import APIKeyHeader, HTTPBearer

from lora_serve.api.caller import EVERYBODY, Caller
from lora_serve.api.error_handlers import Forbidden, Unauthenticated
from lora_serve.api.key_file import Keys

TINKER_PREFIX = "tml-"  # Tinker's clients send no key without it, so any key may be sent with it


def authorize(request: Request) -> Caller:
    """The caller of a request, by its bearer token or, as Anthropic's clients send it, `x-api-key`.

    Raises: `Unauthenticated`.
    """
    state = request.scope.setdefault("state", {})
    if "caller" not in state:  # found once, before the body is read (`limits.py`)
        state["caller"] = _find_caller(request)
    caller: Caller = state["caller"]
    return caller


def _find_caller(request: Request) -> Caller:
    keys: Keys | None = request.app.state.services.keys
    if keys is None:
        return EVERYBODY
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":  # a proxy's own, perhaps
        key = request.headers.get("x-api-key", "")
    if not key.strip():
        raise Unauthenticated("an API key is needed: Authorization: Bearer <key>, or x-api-key: <key>")
    key = key.strip()
    if (caller := keys.find(key) or keys.find(key.removeprefix(TINKER_PREFIX))) is None:
        raise Unauthenticated("unknown API key")
    return caller


# The two schemes are for the OpenAPI schema; `authorize` reads the headers.
BEARER = HTTPBearer(scheme_name="key", auto_error=False, description="an API key, sent as OpenAI's clients do")
HEADER = APIKeyHeader(
    name="x-api-key", scheme_name="header", auto_error=False, description="an API key, sent as Anthropic's clients do"
)


async def _authorized(
    request: Request, bearer: Annotated[Any, Depends(BEARER)], header: Annotated[Any, Depends(HEADER)]
) -> Caller:
    return authorize(request)


Authorized = Annotated[Caller, Depends(_authorized)]


def administer(caller: Authorized) -> Caller:
    """The caller, if it has an admin key. Raises `Unauthenticated`, `Forbidden`."""
    if not caller.admin:
        raise Forbidden("this needs an admin key")
    return caller


Administrator = Annotated[Caller, Depends(administer)]


AdapterName = Annotated[str, InPath(description="the adapter's published name")]


def administered_adapter(name: AdapterName, caller: Administrator) -> str:
    """The adapter in the path, for an admin who may use it. Raises `AdapterNotFound` too."""
    return caller.check_may_use(name)


AdministeredAdapter = Annotated[str, Depends(administered_adapter)]


def read_metrics(caller: Authorized) -> Caller:
    """The caller, if it may read the metrics. Raises `Unauthenticated`, `Forbidden`."""
    if not caller.sees_everything:
        raise Forbidden("this needs a key with metrics: true, or an admin key of all adapters")
    return caller


MetricsReader = Annotated[Caller, Depends(read_metrics)]
