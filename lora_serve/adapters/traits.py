"""Adapter metadata needed before its weights are loaded: virtual tokens, vocabulary, composability, pooling."""

from __future__ import annotations

import msgspec

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.errors import AdapterInvalid
from lora_serve.request import Pooling


class Traits(msgspec.Struct, frozen=True):
    """Stored with each version; the defaults are those of a plain low-rank adapter.

    Attributes:
        virtual: number of virtual tokens before the prompt.
        invocation: aLoRA's invocation tokens: from their last occurrence in the prompt on, what it adds to the base is
            active; empty: always.
        not_additive: why it cannot be weighted or composed; empty if it can.
        vocabulary: vocabulary size of its sequences, if it differs from the base's; else 0.
        embeds, pooling: whether it is made for embeddings, and its own pooling; None: the base's.
    """

    virtual: int = 0
    invocation: tuple[int, ...] = ()
    not_additive: str = ""
    vocabulary: int = 0
    embeds: bool = False
    pooling: Pooling | None = None

    @property
    def replaces(self) -> bool:
        """Whether it replaces parts of the base, which an aLoRA does for all tokens, invoked or not."""
        return bool(self.not_additive)


def traits(lowered: Lowered, base: BaseShape) -> Traits:
    """The traits of a lowered adapter. Raises AdapterInvalid if its head has more tokens than its embedding."""
    return Traits(
        virtual=0 if lowered.prefix is None else lowered.prefix.length,
        invocation=lowered.invocation,
        not_additive=lowered.not_additive,
        vocabulary=_vocabulary(lowered, base),
        embeds=lowered.embeds,
        pooling=lowered.pooling,
    )


def _vocabulary(lowered: Lowered, base: BaseShape) -> int:
    """Size of a replaced vocabulary; 0 if embedding and head keep the base's size."""
    tables = (base.input_embedding, base.head)
    before = [base.modules.get(module, {}).get("weight", (0,))[0] for module in tables]
    after = list(before)
    for index, module in enumerate(tables):
        weight = lowered.overrides[module].parameters.get("weight") if module in lowered.overrides else None
        if weight is not None:
            after[index] = weight.shape[0]
    if after == before:
        return 0
    readable, logits_size = after
    if logits_size > readable:
        raise AdapterInvalid(
            f"the adapter's head makes {logits_size} tokens, but its embedding knows {readable} of them"
        )
    return logits_size
