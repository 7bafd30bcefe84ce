"""Which linear modules of the base are trained, after PEFT's rules, and why others are not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.adapters.checkpoint import shorten
from lora_serve.adapters.formats.targets import Targets
from lora_serve.errors import AdapterInvalid, BadRequest

_SHOWN, _LONGEST = 4, 200  # names in a message, and characters of each: who asks may have sent any number


def target_sites(config: dict[str, Any], base: BaseShape, also: Sequence[str] = ()) -> dict[str, Site]:
    """The linear modules that a PEFT configuration targets, by path. Raises BadRequest naming the field at fault.

    Args:
        also: paths of modules that are adapted whatever it says.
    """
    try:
        targets = Targets(config, base)
        found = {
            name: site
            for name, site in base.sites.items()
            if not name.endswith("]") and (name in also or targets.names(name))
        }  # a mixture's experts are parameters, not modules
    except AdapterInvalid as error:
        raise BadRequest(error.message, param="target_modules") from error
    if targets.unreadable:
        raise BadRequest(f"{targets.unreadable} is not a plain regular expression", param=targets.unreadable)
    given = config["target_modules"]
    named = [] if isinstance(given, str) else given
    ends = {end for path in found for end in _ends(path)}
    missing = [name for name in named if name not in ends]
    missing += [name for name in also if name not in found]
    for name in missing[:_SHOWN]:
        if any(path == name or path.endswith(f".{name}") for path in base.embeddings):
            raise BadRequest(f"{name} is an embedding; adapters on those are not trained", param="target_modules")
        if any(re.search(rf"\.{re.escape(name)}\[", path) for path in base.sites):
            raise BadRequest(
                f"{name} are the weights of a mixture's experts, which are not trained", param="target_modules"
            )
    if missing or not found:
        raise BadRequest(
            f"{shorten([name[:_LONGEST] for name in missing], _SHOWN) or str(given)[:_LONGEST]} is no linear module of "
            "the base; "
            f"some are {', '.join(sorted({name.rpartition('.')[2] for name in base.sites})[:12])}",
            param="target_modules",
        )
    return found


def _ends(path: str) -> Iterator[str]:
    """The path, and its last parts."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))
