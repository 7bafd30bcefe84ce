"""Conditions of a change on what there is at that moment: compare-and-swap by HTTP's `If-Match` and `If-None-Match`."""

from __future__ import annotations

import msgspec

from lora_serve.errors import PreconditionFailed

ANY = "*"


class Precondition(msgspec.Struct, frozen=True):
    """What must hold of an adapter or alias for a change of it to be made.

    Attributes:
        match: entity tags of which it must have one; `*`: it must exist. None: nothing is asked for.
        none_match: entity tags of which it must have none; `*`: it must not exist. None: nothing is asked for.
    """

    match: tuple[str, ...] | None = None
    none_match: tuple[str, ...] | None = None

    def check(self, etag: str | None) -> None:
        """Check what there is: its entity tag, or None if there is nothing. Raises PreconditionFailed."""
        now = "it does not exist" if etag is None else f"it is {etag[:12]} now"
        if self.match is not None and not _is_in(etag, self.match):
            raise PreconditionFailed(f"If-Match does not hold: {now}; nothing was changed", param="If-Match")
        if self.none_match is not None and _is_in(etag, self.none_match):
            raise PreconditionFailed(f"If-None-Match does not hold: {now}; nothing was changed", param="If-None-Match")


def _is_in(etag: str | None, tags: tuple[str, ...]) -> bool:
    return etag is not None and (ANY in tags or etag in tags)


ANYTHING = Precondition()
