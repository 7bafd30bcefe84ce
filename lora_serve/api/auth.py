"""API keys: who sends a request and what they may do.

Only hashes of keys are kept. An ordinary key may generate, with all or with some adapters; an admin key may also
publish and delete these adapters; reading metrics, which name all adapters, is a permission of its own. Without a key
file every caller may do everything. TLS is left to a proxy.
"""

from __future__ import annotations

import fnmatch
import hmac
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import yaml
from fastapi import Depends, Request
from fastapi import Path as InPath
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_serve.api.error_handlers import Forbidden, Unauthenticated
from lora_serve.errors import BadRequest
from lora_serve.names import adapter_not_found

HASH = re.compile(r"sha256:[0-9a-f]{64}")
RECHECK = 1.0  # seconds between two looks at the key file

log = logging.getLogger(__name__)


def hash_key(text: str) -> str:
    """Hash of a key as written in the key file. Keys are long and random, so a plain SHA-256 is enough."""
    return f"sha256:{sha256(text.encode()).hexdigest()}"


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        name: of the key; also the tenant, whose prefix cache is separate. Empty without keys.
        admin: may publish, evict, pin and delete adapters.
        adapters: names or shell patterns of the adapters that may be seen, used and changed; None is all.
        metrics: may read the metrics, which tell of all adapters; so may an admin of all adapters.
        share: of what the server computes while others wait, relative to theirs; a multiple of 1 / 1024.
    """

    name: str
    admin: bool = False
    adapters: tuple[str, ...] | None = None
    metrics: bool = False
    share: float = 1.0

    def may_use(self, adapter: str) -> bool:
        """Whether this caller may see, use and, as an admin, change an adapter."""
        return self.adapters is None or any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def check_may_use(self, adapter: str) -> str:
        """Return the name of an adapter. Raises `AdapterNotFound` if it may not be used, as if it did not exist."""
        if not self.may_use(adapter):
            raise adapter_not_found(adapter)
        return adapter

    def check_may_publish(self, adapter: str, param: str = "name") -> str:
        """Return the name of an adapter to publish. Raises `Forbidden` if it is not one of this caller's."""
        if not self.may_use(adapter):
            raise Forbidden("this key may not publish an adapter of that name", param=param)
        return adapter


EVERYBODY = Caller("", admin=True)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    hash: str
    admin: bool = False
    adapters: list[str] | None = None
    metrics: bool = False
    share: Annotated[float, Field(ge=0.01, le=1000)] = 1.0

    @model_validator(mode="after")
    def _metrics_are_of_all_adapters(self) -> _Entry:
        if self.metrics and self.adapters is not None:
            raise ValueError("metrics tell of all adapters, so a key with adapters cannot have metrics: true")
        return self


class Keys:
    """All API keys of a server.

    Args:
        callers: hash of a key, as `hash_key` makes it → its owner.
    """

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = dict(callers)

    def __repr__(self) -> str:
        admins = sum(caller.admin for caller in self._callers.values())
        return f"<{type(self).__name__} {len(self._callers)} keys, {admins} of admins>"

    def find(self, key: str) -> Caller | None:
        """The owner of a key. Every key is compared, in constant time, so timing reveals nothing."""
        given = hash_key(key)
        found = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, given):
                found = caller
        return found


class KeyFile(Keys):
    """The keys of a YAML file, which is read again when its size or modification time has changed.

    The file maps names to a hash, or to `{hash, admin, adapters, metrics, share}`. A changed file that is invalid is
    logged, and the keys before it stay valid.

    Args:
        clock: seconds; the file is looked at no more than every `RECHECK`.

    Raises: `BadRequest` that names the invalid entry; a file without any key is an error.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked = clock()
        self._signature = _signature(path)  # before the file is read, so that no change is missed
        super().__init__(_read(path))

    def find(self, key: str) -> Caller | None:
        if self._clock() - self._checked >= RECHECK:
            self._checked = self._clock()
            self._reread_if_changed()
        return super().find(key)

    def _reread_if_changed(self) -> None:
        signature = _signature(self._path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._callers = _read(self._path)
        except BadRequest as error:
            log.error("the API keys stay as they were: %s", error.message)
        else:
            log.info("the key file was read again: %r", self)


def load_keys(path: Path | None) -> Keys | None:
    """The keys of a file; None without a file. Raises `BadRequest`."""
    return None if path is None else KeyFile(path)


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
    if (caller := keys.find(key.strip())) is None:
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
    if not (caller.metrics or (caller.admin and caller.adapters is None)):
        raise Forbidden("this needs a key with metrics: true, or an admin key of all adapters")
    return caller


MetricsReader = Annotated[Caller, Depends(read_metrics)]


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _read(path: Path) -> dict[str, Caller]:
    """Owners by the hash of their key."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRequest(f"the key file cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise BadRequest("the key file must map names to hashed keys; `lora-serve key NAME` prints such a line")
    callers: dict[str, Caller] = {}
    for name, value in content.items():
        key, caller = _entry(str(name), value)
        if key in callers:
            raise BadRequest(f"key file: {name} and {callers[key].name} have the same key")
        callers[key] = caller
    return callers


def _entry(name: str, value: Any) -> tuple[str, Caller]:
    try:
        entry = _Entry.model_validate({"hash": value} if isinstance(value, str) else value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([name, *map(str, problem["loc"])])
        raise BadRequest(f"key file: {where}: {problem['msg'].removeprefix('Value error, ')}") from None
    if not HASH.fullmatch(entry.hash):
        raise BadRequest(f"key file: {name}: not the hash of a key (sha256: and 64 hex digits)")
    adapters = None if entry.adapters is None else tuple(entry.adapters)
    return entry.hash, Caller(name, entry.admin, adapters, entry.metrics, round(entry.share * 1024) / 1024)
