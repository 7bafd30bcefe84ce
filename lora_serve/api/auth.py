"""API keys: who sends a request and what they may do.

Only hashes of keys are kept. An ordinary key may generate, with all or with some adapters; an admin key may also
publish and delete adapters. Without a key file every caller may do everything. TLS is left to a proxy.
"""

from __future__ import annotations

import fnmatch
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import yaml
from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from lora_serve.api.error_handlers import Forbidden, Unauthenticated
from lora_serve.errors import BadRequest

HASH = re.compile(r"sha256:[0-9a-f]{64}")


def hash_key(text: str) -> str:
    """Hash of a key as written in the key file. Keys are long and random, so a plain SHA-256 is enough."""
    return f"sha256:{sha256(text.encode()).hexdigest()}"


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        name: of the key; also the tenant, whose prefix cache is separate. Empty without keys.
        admin: may publish, evict, pin and delete adapters.
        adapters: names or shell patterns of the adapters that may be used; None is all.
    """

    name: str
    admin: bool = False
    adapters: tuple[str, ...] | None = None

    def may_use(self, adapter: str) -> bool:
        """Whether this caller may see and use an adapter."""
        return self.adapters is None or any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)


EVERYBODY = Caller("", admin=True)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    hash: str
    admin: bool = False
    adapters: list[str] | None = None


class Keys:
    """All API keys of a server.

    Args:
        callers: hash of a key, as `hash_key` makes it → its owner.
    """

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = dict(callers)

    def __repr__(self) -> str:
        admins = sum(caller.admin for caller in self._callers.values())
        return f"<Keys {len(self._callers)} keys, {admins} of admins>"

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Read a YAML mapping of names to a hash, or to `{hash, admin, adapters}`.

        Raises: `BadRequest` that names the invalid entry; a file without any key is an error.
        """
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
        return cls(callers)

    def find(self, key: str) -> Caller | None:
        """The owner of a key. Every key is compared, in constant time, so timing reveals nothing."""
        given = hash_key(key)
        found = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, given):
                found = caller
        return found


def load_keys(path: Path | None) -> Keys | None:
    """`Keys.load`, or None without a file."""
    return None if path is None else Keys.load(path)


def authorize(request: Request) -> Caller:
    """The caller of a request, by its bearer token or, as Anthropic's clients send it, `x-api-key`.

    Raises: `Unauthenticated`.
    """
    keys: Keys | None = request.app.state.services.keys
    if keys is None:
        return EVERYBODY
    bearer = f"Bearer {request.headers.get('x-api-key', '')}"
    scheme, _, key = request.headers.get("Authorization", bearer).partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("an API key is needed: Authorization: Bearer <key>")
    if (caller := keys.find(key.strip())) is None:
        raise Unauthenticated("unknown API key")
    return caller


Authorized = Annotated[Caller, Depends(authorize)]


def administer(caller: Authorized) -> Caller:
    """The caller, if it has an admin key. Raises `Unauthenticated`, `Forbidden`."""
    if not caller.admin:
        raise Forbidden("this needs an admin key")
    return caller


Administrator = Annotated[Caller, Depends(administer)]


def _entry(name: str, value: Any) -> tuple[str, Caller]:
    try:
        entry = _Entry.model_validate({"hash": value} if isinstance(value, str) else value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([name, *map(str, problem["loc"])])
        raise BadRequest(f"key file: {where}: {problem['msg']}") from None
    if not HASH.fullmatch(entry.hash):
        raise BadRequest(f"key file: {name}: not the hash of a key (sha256: and 64 hex digits)")
    return entry.hash, Caller(name, entry.admin, None if entry.adapters is None else tuple(entry.adapters))
