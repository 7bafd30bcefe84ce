"""Admission checks of a request against the base and its adapters; raise the error that refuses it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lora_serve.adapters.registry import Lease
from lora_serve.errors import BadRequest, ContextExceeded, SettingsNotApplied
from lora_serve.messages import EngineInfo
from lora_serve.names import MODULES, POOLING
from lora_serve.request import MOST_ADAPTERS, EmbeddingParams, Pooling, Request


def check(request: Request, leases: Sequence[Lease], info: EngineInfo) -> None:
    """Check a request against the base and its adapters. Raises BadRequest or ContextExceeded, naming the field."""
    field = "prompt" if request.embedding is None else "input"
    if not request.prompt:
        raise BadRequest(f"the {field} has no tokens", param=field)
    _check_composition(leases)
    if request.embedding is not None:
        _check_embedding(request.embedding, leases, info)
    elif info.headless:
        raise BadRequest("the base model has no LM head: it makes embeddings, no text", param="model")
    vocabulary = next((lease.traits.vocabulary for lease in leases if lease.traits.vocabulary), info.vocab_size)
    _check_tokens(request.prompt, vocabulary, f"the {field}", field)
    _check_tokens(request.sampling.stop_token_ids, vocabulary, "stop_token_ids", "stop_token_ids")
    _check_tokens(request.sampling.logit_bias, vocabulary, "logit_bias", "logit_bias")
    virtual = max((lease.traits.virtual for lease in leases), default=0)
    if virtual + len(request.prompt) + min(request.sampling.max_tokens, 1) > info.max_model_len:
        more = f" and the adapter {virtual} virtual ones" if virtual else ""
        raise ContextExceeded(
            f"the {field} has {len(request.prompt)} tokens{more}, the context {info.max_model_len}", param=field
        )


def pooling_of(request: Request, leases: Sequence[Lease], info: EngineInfo) -> Pooling | None:
    """How a request's prompt is embedded, which was checked; None if it generates.

    By an adapter without a pooling of its own as by the base, or else by the last token, normalised.
    """
    if request.embedding is None:
        return None
    own = leases[0].traits.pooling if leases else None
    return own or info.pooling or Pooling()


def check_settings(request: Request, leases: Sequence[Lease]) -> None:
    """Check that a request to generate was made by the settings of its adapters. Raises SettingsNotApplied."""
    missing = next((lease.name for lease in leases if lease.settings_missing), None)
    if missing is not None and request.embedding is None:
        raise SettingsNotApplied(f"adapter {missing} was replaced while the request began; ask again", retry_after=1)


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


def _check_embedding(params: EmbeddingParams, leases: Sequence[Lease], info: EngineInfo) -> None:
    if not leases and info.pooling is None:
        raise BadRequest(
            f"the base model makes no embeddings: {info.not_embedding}. It would with {MODULES} and {POOLING}; so do "
            "adapters of task_type FEATURE_EXTRACTION",
            param="model",
        )
    for lease in leases:
        if not lease.traits.embeds:
            raise BadRequest(
                f"adapter {lease.name} makes no embeddings: the task_type in its adapter_config.json is not "
                f"FEATURE_EXTRACTION, and it has no {POOLING}",
                param="adapter",
            )
        if lease.traits.pooling != leases[0].traits.pooling:
            raise BadRequest(f"adapters {leases[0].name} and {lease.name} pool differently", param="adapter")
    if (params.dimensions or 0) > info.hidden_size:
        raise BadRequest(f"an embedding has {info.hidden_size} dimensions", param="dimensions")


def _check_tokens(tokens: Collection[int], vocabulary: int, what: str, param: str) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise BadRequest(f"{what} has token ids outside 0..{vocabulary - 1}", param=param)
