"""From a request body to engine input: prompt tokens, sampling parameters, adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateError

from lora_serve.api.auth import Caller
from lora_serve.api.openai.schemas import Generation, Message, WeightedAdapter
from lora_serve.api.openai.structured_output import Grammar
from lora_serve.api.services import Services
from lora_serve.errors import BadRequest, ContextExceeded, ServeError, Unavailable
from lora_serve.messages import EngineInfo
from lora_serve.names import adapter_not_found
from lora_serve.request import AdapterUse, Sampling

LONG = 2000  # characters; longer texts are tokenized in a thread
LARGEST_VOCABULARY = 1 << 31


class ModelNotFound(ServeError):
    """`model` is neither the base nor an adapter."""

    kind = "model_not_found"


def engine_info(services: Services) -> EngineInfo:
    """The engine's description of the base model. Raises `Unavailable` before the first start is complete."""
    if services.engine.info is None:
        raise Unavailable("the engine is starting", retry_after=1)
    return services.engine.info


def check_tokens(tokens: Iterable[int], limit: int, field: str) -> None:
    """Raise `BadRequest` if a token id is outside the vocabulary; `field` is named in the message."""
    if any(token >= limit for token in tokens):
        raise BadRequest(f"{field} has token ids outside 0..{limit - 1}", param=field)


def vocabulary_size(body: Generation, services: Services) -> int:
    """Upper bound of token ids; none with an adapter, which may have its own vocabulary: the engine checks it."""
    named = body.adapter or (body.model and body.model not in base_names(services))
    return LARGEST_VOCABULARY if named else engine_info(services).vocab_size


def base_names(services: Services) -> set[str]:
    """All values of `model` that mean the base."""
    return {engine_info(services).model, services.config.served_name(), services.config.model}


def resolve_adapters(body: Generation, services: Services, caller: Caller) -> tuple[AdapterUse, ...]:
    """The adapters that `adapter` and `model` name together; none for the base.

    Raises: `BadRequest`; `AdapterNotFound` for an adapter that the caller may not use, as for one that does not exist.
    """
    given = body.adapter
    if given is None:
        uses: tuple[AdapterUse, ...] = ()
    elif isinstance(given, list):
        uses = tuple(_parse_adapter(entry) for entry in given)
    else:
        uses = (_parse_adapter(given if isinstance(given, WeightedAdapter) else WeightedAdapter(name=given)),)
    if body.model and body.model not in base_names(services):
        named = _parse_adapter(WeightedAdapter(name=body.model))
        if not uses:
            uses = (named,)
        elif [(use.name, use.version) for use in uses] != [(named.name, named.version)]:
            raise BadRequest("model and adapter name different adapters", param="adapter")
    if len({use.name for use in uses}) < len(uses):
        raise BadRequest("an adapter is named twice", param="adapter")
    for use in uses:
        if not caller.may_use(use.name):
            raise adapter_not_found(use.name)
    return uses


def check_n(body: Generation, services: Services) -> None:
    """Raise `BadRequest` if `n` is over the configured limit."""
    if (body.n or 1) > services.config.max_n:
        raise BadRequest(f"n is more than {services.config.max_n}", param="n")


def _parse_adapter(given: WeightedAdapter) -> AdapterUse:
    name, at, version = given.name.partition("@")
    if at and not version:
        raise BadRequest("an adapter's name ends in @ without a version", param="adapter")
    return AdapterUse(name, version or None, given.weight)


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
    grammar: Grammar | None = None,
) -> Sampling:
    """The body's sampling parameters, with defaults from the model's generation config.

    Args:
        max_tokens: as requested; an error if the remaining context is shorter.
        default_max_tokens: if none was requested, at most the remaining context; None is the whole remaining context.
        field: named if the prompt is too long.
        grammar: what the output must match.

    Raises: `BadRequest`, `ContextExceeded`.
    """
    info = engine_info(services)
    defaults = info.generation_defaults
    remaining = info.max_model_len - prompt_tokens
    needed = 1 if max_tokens is None else max_tokens
    if needed > remaining:
        raise ContextExceeded(
            f"the context has {info.max_model_len} tokens; the prompt has {prompt_tokens}, "
            f"and {needed} more are asked for",
            param="max_tokens" if needed > 1 else field,
        )
    default = remaining if default_max_tokens is None else min(default_max_tokens, remaining)
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    check_tokens(bias, vocabulary_size(body, services), "logit_bias")
    check_tokens(body.stop_token_ids or (), vocabulary_size(body, services), "stop_token_ids")

    def chosen(field: str, otherwise: float) -> Any:
        value = getattr(body, field)
        return defaults.get(field, otherwise) if value is None else value

    return Sampling(
        max_tokens=default if max_tokens is None else max_tokens,
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


async def encode(services: Services, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text; an empty text is the BOS token, if the tokenizer has one."""

    def work() -> list[int]:
        ids: list[int] = services.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        if not ids and services.tokenizer.bos_token_id is not None:
            ids = [services.tokenizer.bos_token_id]
        return ids

    return await asyncio.to_thread(work) if len(text) > LONG else work()


async def encode_chat(
    services: Services,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    arguments: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of messages in the base's chat template. Raises `BadRequest` if it has none or rejects them."""
    if not services.tokenizer.chat_template:
        raise BadRequest("the base model has no chat template; use /v1/completions", param="messages")
    turns = []
    for message in messages:
        content = message.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        turns.append({"role": message.role, "content": text} | ({"name": message.name} if message.name else {}))

    def work() -> list[int]:
        text = services.tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(arguments or {}),
        )
        ids: list[int] = services.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    try:
        return await asyncio.to_thread(work)
    except (TemplateError, ValueError, TypeError) as error:
        raise BadRequest(f"the chat template refuses these messages: {str(error)[:200]}", param="messages") from error
