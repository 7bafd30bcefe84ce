"""Admission checks of a request against the base and its adapters; raise the error that refuses it."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

from lora_serve.adapters.registry import Lease
from lora_serve.engine.fairness import SlotRotation
from lora_serve.errors import BadRequest, ContextExceeded
from lora_serve.messages import EngineInfo
from lora_serve.request import MOST_ADAPTERS, Request


def check(request: Request, leases: Sequence[Lease], info: EngineInfo) -> None:
    """Check a request against the base and its adapters. Raises BadRequest or ContextExceeded, naming the field."""
    if not request.prompt:
        raise BadRequest("the prompt has no tokens", param="prompt")
    _check_composition(leases)
    vocabulary = next((lease.traits.vocabulary for lease in leases if lease.traits.vocabulary), info.vocab_size)
    _check_tokens(request.prompt, vocabulary, "the prompt", "prompt")
    _check_tokens(request.sampling.stop_token_ids, vocabulary, "stop_token_ids", "stop_token_ids")
    _check_tokens(request.sampling.logit_bias, vocabulary, "logit_bias", "logit_bias")
    virtual = max((lease.traits.virtual for lease in leases), default=0)
    if virtual + len(request.prompt) + min(request.sampling.max_tokens, 1) > info.max_model_len:
        more = f" and the adapter {virtual} virtual ones" if virtual else ""
        raise ContextExceeded(
            f"the prompt has {len(request.prompt)} tokens{more}, the context {info.max_model_len}", param="prompt"
        )


def check_adapters_fit(leases: Sequence[Lease], pinned: Set[str], rotation: SlotRotation) -> None:
    """Check that a request's adapters can be on the device at once, beside pinned ones. Raises BadRequest."""
    sizes = {lease.digest: lease.bytes for lease in leases if lease.digest not in pinned}
    if len(sizes) > rotation.slots - len(pinned):
        raise BadRequest("more adapters than can be on the device at once", param="adapter")
    if rotation.capacity is not None and sum(sizes.values()) > rotation.capacity // 2:  # half may be pinned
        raise BadRequest(
            f"the adapter takes {sum(sizes.values())} bytes; a request's adapters may take {rotation.capacity // 2}, "
            "half of --adapter-device-memory",
            param="adapter",
        )


def _check_composition(leases: Sequence[Lease]) -> None:
    if len(leases) > MOST_ADAPTERS:
        raise BadRequest(f"more than {MOST_ADAPTERS} adapters in one request", param="adapter")
    for lease in leases:
        if lease.traits.not_additive and (len(leases) > 1 or lease.weight != 1.0):
            what = "composed with others" if len(leases) > 1 else "weighted"
            raise BadRequest(
                f"adapter {lease.name} cannot be {what}: {lease.traits.not_additive}; ask for it alone, at weight 1",
                param="adapter",
            )


def _check_tokens(tokens: Collection[int], vocabulary: int, what: str, param: str) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise BadRequest(f"{what} has token ids outside 0..{vocabulary - 1}", param=param)
