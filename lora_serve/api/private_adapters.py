"""Names of adapters that only one key may use, by what the name begins with."""

from __future__ import annotations

import hashlib
import re
import secrets

_PRIVATE = re.compile(r"tinker-([0-9a-f]{12})-[0-9a-f]{16}")


def private_adapter(owner: str) -> str:
    """A new name of an adapter that is its owner's; `owner` as `Caller.owner` says."""
    return f"tinker-{_mark(owner)}-{secrets.token_hex(8)}"


def may_use_private(adapter: str, owner: str) -> bool | None:
    """Whether an adapter is this owner's; None if it is nobody's in particular."""
    found = _PRIVATE.fullmatch(adapter)
    return None if found is None else found[1] == _mark(owner)


def _mark(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:12]
