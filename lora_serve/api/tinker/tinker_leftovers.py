"""Finds what servers that were killed, or engines that were away, left of Tinker's API in the store."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from lora_serve.api.private_adapters import is_private
from lora_serve.api.services import EngineProtocol
from lora_serve.messages import AdapterInfo, ListAdapters

PREFIX = "tinker-"
_SESSION = re.compile(r"[0-9a-f]{32}")


class NeedlessAdapters:
    """Adapters of sampling weights that no checkpoint and no sampling session names.

    One counts only if it was so for a while: between its publication and the note of it, nothing names it either.

    Args:
        seconds: how long.
    """

    def __init__(self, engine: EngineProtocol, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._seconds, self._clock = engine, seconds, clock
        self._seen: dict[str, float] = {}  # when first

    async def find(self, needed: Callable[[], set[str]]) -> list[str]:
        """Those there are now; `needed` is asked once all are listed. Raises the engine's `ServeError`."""
        found, after = set[str](), PREFIX
        while page := msgspec.convert(await self._engine.call(ListAdapters(after)), list[AdapterInfo]):
            found |= {each.name for each in page if is_private(each.name) and not each.pinned}
            after = page[-1].name
            if not after.startswith(PREFIX):
                break
        now = self._clock()
        self._seen = {name: self._seen.get(name, now) for name in found - needed()}
        return sorted(name for name, since in self._seen.items() if now - since >= self._seconds)


def old_session_folders(folder: Path, seconds: float, now: Callable[[], float] = time.time) -> list[Path]:
    """The folders of sessions to which nothing came for so many seconds; those without a record as well."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_session = _SESSION.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        if is_session and path.stat().st_mtime <= now() - seconds:
            found.append(path)
    return found
