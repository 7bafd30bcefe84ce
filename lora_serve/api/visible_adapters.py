"""The adapters that a key may use, page by page, so that no message of the engine grows with their number."""

from __future__ import annotations

import msgspec

from lora_serve.api.caller import Caller
from lora_serve.api.services import Services
from lora_serve.messages import AdapterInfo, ListAdapters


async def usable_adapters(
    services: Services, caller: Caller, after: str = "", most: int | None = None
) -> list[AdapterInfo]:
    """The adapters that a key may use whose names come after `after`, sorted by name; at most so many."""
    found: list[AdapterInfo] = []
    while page := msgspec.convert(await services.engine.call(ListAdapters(after)), list[AdapterInfo]):
        found += [info for info in page if caller.may_use(info.name)]
        if most is not None and len(found) >= most:
            return found[:most]
        after = page[-1].name
    return found
