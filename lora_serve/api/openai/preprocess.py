"""From a request body to engine input: prompt tokens, sampling parameters, adapters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

import msgspec

from lora_serve.api.caller import Caller
from lora_serve.api.openai.encode import TextTooLong
from lora_serve.api.openai.schemas import Generation, ModelSelection, WeightedAdapter
from lora_serve.api.openai.structured_output import Grammar
from lora_serve.api.services import Services
from lora_serve.errors import AdapterBroken, AdapterNotFound, BadRequest, ContextExceeded, ServeError, Unavailable
from lora_serve.messages import AdapterInfo, DescribeAdapter, DescribeAlias, EngineInfo, ListNames
from lora_serve.names import adapter_broken, adapter_not_found
from lora_serve.request import AdapterUse, Sampling

LARGEST_VOCABULARY = 1 << 31
MOST_NAMES = 10_000  # in which those are sought that a caller may use
MOST_SIMILAR_NAMES = 2000  # of these, that an unknown one is compared with


class ModelNotFound(ServeError):
    """`model` is neither the base nor an adapter or alias."""

    kind = "model_not_found"


def engine_info(services: Services) -> EngineInfo:
    """The engine's description of the base model. Raises `Unavailable` before the first start is complete."""
    if services.engine.info is None:
        raise Unavailable("the engine is starting", retry_after=1)
    return services.engine.info


def check_tokens(tokens: Collection[int], limit: int, field: str) -> None:
    """Raise `BadRequest` if a token id is outside the vocabulary; `field` is named in the message."""
    if max(tokens, default=0) >= limit:
        raise BadRequest(f"{field} has token ids outside 0..{limit - 1}", param=field)


def vocabulary_size(body: ModelSelection, services: Services) -> int:
    """Upper bound of token ids; none with an adapter, which may have its own vocabulary: the engine checks it."""
    named = body.adapter or (body.model and body.model not in base_names(services))
    return LARGEST_VOCABULARY if named else engine_info(services).vocab_size


def base_names(services: Services) -> set[str]:
    """All values of `model` that mean the base."""
    return {engine_info(services).model, services.config.served_name(), services.config.model}


def resolve_adapters(body: ModelSelection, services: Services, caller: Caller) -> tuple[AdapterUse, ...]:
    """The adapters that `adapter` and `model` name together; none for the base. The weights of one named twice add up.

    Raises: `BadRequest`; `AdapterNotFound` for an adapter that the caller may not use, as for one that does not exist.
    """
    given = body.adapter
    if given is None:
        uses: tuple[AdapterUse, ...] = ()
    elif isinstance(given, list):
        uses = tuple(_parse_adapter(entry.name, entry.weight) for entry in given)
    elif isinstance(given, WeightedAdapter):
        uses = (_parse_adapter(given.name, given.weight),)
    else:
        uses = (_parse_adapter(given),)
    if body.model and body.model not in base_names(services):
        named = _parse_adapter(without_base(body.model, services))
        if not uses:
            uses = (named,)
        elif [(use.name, use.version) for use in uses] != [(named.name, named.version)]:
            raise BadRequest("model and adapter name different adapters", param="adapter")
    weights: dict[tuple[str, str | None], float] = {}
    for use in uses:
        weights[use.name, use.version] = weights.get((use.name, use.version), 0.0) + use.weight
    uses = tuple(AdapterUse(name, version, weight) for (name, version), weight in weights.items())
    for use in uses:
        if not caller.may_use(use.name):
            raise adapter_not_found(use.name)
    return uses


async def existing_adapters(body: ModelSelection, services: Services, caller: Caller) -> list[AdapterInfo]:
    """The adapters that `adapter` and `model` name; for an alias, all that it stands for.

    Raises as a generating route would, if one does not exist.
    """
    found = []
    try:
        await services.trained.publish_checkpoint(body.model, caller)
        uses = resolve_adapters(body, services, caller)
        await services.sources.fetch_missing([use.name for use in uses], caller.name)
        for use in uses:
            try:
                found.append(await _describe(use, services))
            except AdapterNotFound as error:
                found += [await _describe(each, services) for each in await _targets(use, services, error)]
    except AdapterNotFound as error:
        raise await explain_not_found(error, body, services, caller) from None
    return found


async def _describe(use: AdapterUse, services: Services) -> AdapterInfo:
    """The adapter that is named. Raises AdapterNotFound, AdapterBroken."""
    info = msgspec.convert(await services.engine.call(DescribeAdapter(use.name)), AdapterInfo)
    if info.broken is not None:
        raise adapter_broken(use.name, info.broken)
    if use.version is not None and not any(each.digest.startswith(use.version) for each in info.versions):
        raise adapter_not_found(f"{use.name}@{use.version}")
    return info


async def _targets(use: AdapterUse, services: Services, error: AdapterNotFound) -> list[AdapterUse]:
    """The adapters that an alias stands for. Raises the error if the name is none, or with a version."""
    try:
        alias = await services.engine.call(DescribeAlias(use.name))
    except AdapterNotFound:
        raise error from None
    if use.version is not None:
        raise error
    if not alias["targets"]:
        raise AdapterBroken(f"alias {use.name} cannot be served: {alias['broken']}", param="adapter")
    return [_parse_adapter(target["adapter"]) for target in alias["targets"]]


async def explain_not_found(
    error: AdapterNotFound, body: ModelSelection, services: Services, caller: Caller
) -> ServeError:
    """The error for a name that no adapter has: about `model` if that is where it was given, with similar names."""
    usable = await _usable_names(services, caller)
    if body.adapter is not None or not body.model:
        given = error.message.removeprefix("adapter ").partition(" ")[0]
        return AdapterNotFound(error.message + services.sources.describe() + _resembles(given, usable), param="adapter")
    resembled = _resembles(without_base(body.model, services), [engine_info(services).model, *usable])
    missing = f"model {body.model[:100]} does not exist{services.sources.describe()}"
    return ModelNotFound(missing + resembled, param="model")


async def similar_names(name: str, services: Services, caller: Caller) -> str:
    """What is added to the message that there is no adapter of this name: similar ones, or that it is an alias."""
    usable = await _usable_names(services, caller)
    return "; it is an alias: see /v1/aliases" if name in usable else _resembles(name, usable)


async def _usable_names(services: Services, caller: Caller) -> list[str]:
    names: list[str] = await services.engine.call(ListNames(MOST_NAMES))
    return list(islice(filter(caller.may_use, names), MOST_SIMILAR_NAMES))


def _resembles(name: str, names: Sequence[str]) -> str:
    found = get_close_matches(name[:200], names)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def check_n(body: Generation, services: Services) -> None:
    """Raise `BadRequest` if `n` is over the configured limit."""
    if (body.n or 1) > services.config.max_n:
        raise BadRequest(f"n is more than {services.config.max_n}", param="n")


def without_base(model: str, services: Services) -> str:
    """The adapter that `model` names: a fine-tuned model's, or as `adapter` or `base:adapter` (SGLang's form)."""
    if (trained := services.trained.adapter(model)) is not None:
        return trained
    base = next((name for name in base_names(services) if model.startswith(f"{name}:")), None)
    return model if base is None else model[len(base) + 1 :]


def _parse_adapter(given: str, weight: float = 1.0) -> AdapterUse:
    name, at, version = given.partition("@")
    if at and not version:
        raise BadRequest("an adapter's name ends in @ without a version", param="adapter")
    return AdapterUse(name, version or None, weight)


def sampling_params(
    body: Generation,
    services: Services,
    *,
    prompt_tokens: int,
    max_tokens: int | None,
    default_max_tokens: int | None,
    field: str,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    clamp: bool = False,
    grammar: Grammar | None = None,
) -> Sampling:
    """The body's sampling parameters, with defaults from the model's generation config.

    Args:
        max_tokens: as requested.
        default_max_tokens: if none was requested, at most the remaining context; None is the whole remaining context.
        clamp: reduce `max_tokens` to the remaining context, instead of refusing it.
        field: named if the prompt is too long.
        grammar: what the output must match.

    Raises: `BadRequest`, `ContextExceeded`.
    """
    info = engine_info(services)
    defaults = info.generation_defaults
    remaining = info.max_model_len - prompt_tokens
    needed = 1 if max_tokens is None else min(max_tokens, 1) if clamp else max_tokens
    if needed > remaining:
        raise context_exceeded(info, prompt_tokens, needed, field)
    default = remaining if default_max_tokens is None else min(default_max_tokens, remaining)
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    check_tokens(bias, vocabulary_size(body, services), "logit_bias")
    check_tokens(body.stop_token_ids or (), vocabulary_size(body, services), "stop_token_ids")

    def chosen(field: str, otherwise: float) -> Any:
        value = getattr(body, field)
        return defaults.get(field, otherwise) if value is None else value

    return Sampling(
        max_tokens=default if max_tokens is None else min(max_tokens, remaining),
        min_tokens=body.min_tokens or 0,
        temperature=float(chosen("temperature", 1.0)),
        top_k=max(0, int(chosen("top_k", 0))),
        top_p=float(chosen("top_p", 1.0)),
        min_p=body.min_p or 0.0,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=float(chosen("repetition_penalty", 1.0)),
        logit_bias=bias,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=None if grammar is None else grammar.text,
        grammar_field="" if grammar is None else grammar.field,
    )


def context_exceeded(info: EngineInfo, prompt_tokens: int, requested: int, field: str) -> ContextExceeded:
    """The error for a prompt and requested tokens beyond the context, in the sentences by which clients know it."""
    if prompt_tokens >= info.max_model_len or requested <= 1:
        return _text_exceeds(info, field, f"{prompt_tokens} tokens")
    return ContextExceeded(
        f"This model's maximum context length is {info.max_model_len} tokens. However, you requested "
        f"{prompt_tokens + requested} tokens ({prompt_tokens} in the {field}, "
        f"{requested} in the completion). Please reduce the length of the {field} or completion.",
        param="max_tokens",
    )


def text_too_long(info: EngineInfo, field: str) -> ContextExceeded:
    """The error for a text that was not tokenized because it is far longer than the context."""
    return _text_exceeds(info, field, f"more than {info.max_model_len} tokens")


def _text_exceeds(info: EngineInfo, field: str, tokens: str) -> ContextExceeded:
    return ContextExceeded(
        f"This model's maximum context length is {info.max_model_len} tokens. However, your {field} resulted in "
        f"{tokens}. Please reduce the length of the {field}.",
        param=field,
    )


async def encode(services: Services, texts: Sequence[str], field: str, *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text; an empty text is the BOS token, if the tokenizer has one.

    Raises: `ContextExceeded` for a text that is far longer than the context. One that is little longer is encoded.
    """
    info = engine_info(services)
    try:
        encoded = await services.encoder.encode(texts, info.max_model_len, add_special_tokens=add_special_tokens)
    except TextTooLong:
        raise text_too_long(info, field) from None
    bos = services.tokenizer.bos_token_id
    return [ids or ([] if bos is None else [bos]) for ids in encoded]
