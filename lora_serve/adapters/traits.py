"""What an adapter does to a whole sequence: what must be known of it before its weights are in memory."""

from __future__ import annotations

import msgspec

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.errors import AdapterInvalid


class Traits(msgspec.Struct, frozen=True):
    """Kept beside a version on disk; the defaults are those of a plain low-rank adapter.

    Attributes:
        virtual: how many virtual tokens it puts before the prompt.
        invocation: tokens from whose last occurrence in the prompt on it is active; empty: from the beginning.
        not_additive: why it cannot be weighted or composed; empty if it can.
        vocabulary: how many tokens its sequences know, if that is another number than the base's; else 0.
    """

    virtual: int = 0
    invocation: tuple[int, ...] = ()
    not_additive: str = ""
    vocabulary: int = 0


def traits(lowered: Lowered, base: BaseShape) -> Traits:
    """The traits of a lowered adapter. Raises AdapterInvalid if its logits would name tokens that it cannot read."""
    return Traits(
        virtual=0 if lowered.prefix is None else lowered.prefix.length,
        invocation=lowered.invocation,
        not_additive=lowered.not_additive,
        vocabulary=_vocabulary(lowered, base),
    )


def _vocabulary(lowered: Lowered, base: BaseShape) -> int:
    """Tokens of a replaced vocabulary; 0 if the adapter leaves both of its tables at the base's size."""
    tables = (base.input_embedding, base.head)
    before = [base.modules.get(module, {}).get("weight", (0,))[0] for module in tables]
    after = list(before)
    for place, module in enumerate(tables):
        weight = lowered.overrides[module].parameters.get("weight") if module in lowered.overrides else None
        if weight is not None:
            after[place] = weight.shape[0]
    if after == before:
        return 0
    read, made = after
    if made > read:
        raise AdapterInvalid(f"the adapter's head makes {made} tokens, but its embedding knows {read} of them")
    return made
