"""The aliases that a key may use, with those of their targets that it may use by themselves."""

from __future__ import annotations

import hashlib

import msgspec

from lora_serve.api.caller import Caller
from lora_serve.api.services import Services
from lora_serve.messages import AliasInfo, ListAliases


async def usable_aliases(services: Services, caller: Caller) -> list[AliasInfo]:
    """All aliases that a key may use, sorted by name."""
    found: list[AliasInfo] = []
    after = ""
    while page := msgspec.convert(await services.engine.call(ListAliases(after)), list[AliasInfo]):
        found += [info for info in page if caller.may_use(info.name)]
        after = page[-1].name
    return found


def as_seen_by(caller: Caller, info: AliasInfo) -> AliasInfo:
    """An alias without the targets that a key may not use, which do not exist for it.

    Its entity tag is then of what is left: nobody learns from it what else there is, or that it changed. Such a key may
    not change the alias either, so the tag is for reading only.
    """
    targets = [target for target in info.targets if caller.may_use(adapter_of(target.adapter))]
    if len(targets) == len(info.targets):
        return info
    broken = None if info.broken is None else "not all that it stands for can be served"
    etag = hashlib.sha256(msgspec.json.encode(("seen", targets, info.sticky, broken))).hexdigest()
    return msgspec.structs.replace(info, targets=targets, broken=broken, etag=etag)


def adapter_of(target: str) -> str:
    """The adapter's name in a target, which may name a version."""
    return target.partition("@")[0]
