"""Requests made by the settings of their adapters (`serve.yaml`): which versions those are, and what they ask for.

A prompt depends on the settings of the version that will answer, so the version is found before the prompt is made, and
the request names it exactly. The engine has the last word: it refuses a request that was not made by the settings of a
version that it is about to get, and one for a version that is gone; then it is made anew. Where no version has settings
nothing of this costs anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from lora_serve.api.caller import Caller
from lora_serve.api.openai.chat_schemas import ChatCompletion, Message
from lora_serve.api.openai.preprocess import engine_info, resolve_adapters
from lora_serve.api.openai.schemas import Generation, ModelSelection
from lora_serve.api.services import Services
from lora_serve.api.settings_cache import PromptTools, Writing, make_tools
from lora_serve.errors import AdapterBroken, AdapterNotFound, BadRequest
from lora_serve.messages import ResolveAdapters, ResolvedAdapter
from lora_serve.names import SETTINGS, adapter_broken
from lora_serve.request import AdapterUse, Routing
from lora_serve.serve_settings import SAMPLING, ServeSettings

SYSTEM_ROLES = ("system", "developer")

Body = TypeVar("Body", bound=Generation)


@dataclass(frozen=True)
class AdaptedCall:
    """What an API call is made with.

    Attributes:
        uses: its adapters; exact versions if any of them has settings.
        services: with the tokenizer and the chat format that the adapters ask for.
        settings: adapter → its settings, of those that have some.
        vocab_size: number of the model's tokens with these adapters; known if there are settings.
    """

    uses: tuple[AdapterUse, ...]
    services: Services
    settings: tuple[tuple[str, ServeSettings], ...] = ()
    vocab_size: int = 0

    def setting(self, name: str) -> Any:
        """What the adapters say; None if they do not. Raises BadRequest if they say different things."""
        found = [(adapter, getattr(settings, name)) for adapter, settings in self.settings]
        found = [(adapter, value) for adapter, value in found if value is not None]
        for adapter, value in found:
            if value != found[0][1]:
                raise BadRequest(
                    f"adapters {found[0][0]} and {adapter} have different settings of {name} ({SETTINGS})"
                    f"{'' if name in UNSETTLED else '; say in the request which it shall be'}",
                    param="adapter",
                )
        return found[0][1] if found else None

    def max_tokens(self, requested: int | None) -> int | None:
        """What the adapters say about the length of a reply, if the request does not."""
        return self.setting("max_tokens") if requested is None else None

    def complete(self, body: Body) -> Body:
        """A body with the adapters' defaults where it says nothing."""
        if not self.settings:
            return body
        names = (name for name in (*SAMPLING, "stop") if getattr(body, name) is None)
        update = {name: value for name in names if (value := self.setting(name)) is not None}
        if "stop" in update:
            update["stop"] = [*update["stop"]]
        if not body.ignore_eos and (ends := self._stop_token_ids()):
            update["stop_token_ids"] = [*(body.stop_token_ids or ()), *ends]
        return body.model_copy(update=update)

    def complete_chat(self, body: ChatCompletion) -> ChatCompletion:
        """The same for a conversation, which gets the adapters' system prompt if it has none."""
        body = self.complete(body)
        return body.model_copy(update={"messages": self.with_system(body.messages)}) if self.settings else body

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Messages with the adapters' system prompt before them, if they have none."""
        if not self.settings or any(message.role in SYSTEM_ROLES for message in messages):
            return messages
        system = self.setting("system")
        return messages if system is None else [Message(role="system", content=system), *messages]

    def _stop_token_ids(self) -> list[int]:
        names = self.setting("stop_tokens") or ()
        found, missing = find_tokens(self.services.tokenizer, names)
        reason = None if missing is None else no_token(missing)
        for name, token in zip(names, found, strict=False):
            if token >= self.vocab_size:
                reason = f"{name[:50]!r} in stop_tokens, token {token} of a model that has {self.vocab_size}"
        if reason is not None:
            adapter = next(name for name, settings in self.settings if settings.stop_tokens)
            raise adapter_broken(adapter, f"its {SETTINGS} has {reason}")
        return found


UNSETTLED = ("chat_template", "added_tokens", "stop_tokens")  # that no request can say


async def adapt(
    uses: tuple[AdapterUse, ...], services: Services, routing: Callable[[], Routing], *, chat: bool
) -> AdaptedCall:
    """Find the settings that a call of these adapters is to be made by.

    Args:
        routing: what aliases choose by.
        chat: whether it is a conversation, for which a chat template counts.

    Raises: BadRequest if those of several adapters contradict each other; AdapterBroken if they do not fit the base.
    """
    state = services.engine.stats.settings_state
    if not uses or not state:
        return AdaptedCall(uses, services)
    versions = await _resolve(uses, services, routing(), state)
    if versions is None:
        return AdaptedCall(uses, services)
    settings = tuple((each.name, each.settings) for each in versions if each.settings is not None)
    if not settings and all(version.name == use.name for version, use in zip(versions, uses, strict=True)):
        return AdaptedCall(uses, services)
    exact = tuple(
        AdapterUse(version.name, version.digest, use.weight, settings_applied=True)
        for version, use in zip(versions, uses, strict=True)
    )
    own = (version.vocab_size for version in versions if version.vocab_size)
    adapted = AdaptedCall(exact, services, settings, next(own, engine_info(services).vocab_size))
    writing = adapted.setting("chat_template") if chat else None, adapted.setting("added_tokens") or ()
    if writing == (None, ()):
        return adapted
    tools = await find_tools(services, writing)
    derived = replace(services, tokenizer=tools.tokenizer, encoder=tools.encoder, chat=tools.chat)
    return replace(adapted, services=derived)


async def adapt_prompt(body: ModelSelection, services: Services, caller: Caller, *, chat: bool = True) -> AdaptedCall:
    """The same where a prompt is only written, and not generated from; of an alias, any target counts."""
    await services.trained.publish_checkpoint(body.model, caller)
    return await adapt(resolve_adapters(body, services, caller), services, Routing, chat=chat)


async def _resolve(
    uses: tuple[AdapterUse, ...], services: Services, routing: Routing, state: int
) -> list[ResolvedAdapter] | None:
    """The versions that are meant; None if one cannot be had, which the engine says, or changes, at admission."""
    known = [services.settings.find((use.name, use.version), state) for use in uses]
    if not any(version is None for version in known):
        return [version for version in known if version is not None]
    try:
        answer = await services.engine.call(ResolveAdapters(uses, routing))
    except (AdapterNotFound, AdapterBroken, BadRequest):
        return None
    found = msgspec.convert(answer, list[ResolvedAdapter])
    if services.engine.stats.settings_state == state:
        for use, version in zip(uses, found, strict=True):
            if version.name == use.name:
                services.settings.keep((use.name, use.version), state, version)
    return found


async def find_tools(services: Services, writing: Writing) -> PromptTools:
    """The tokenizer and chat format of an adapter, made in a thread if they are not at hand."""
    tools = services.settings.find_tools(writing)
    if tools is None:
        base = PromptTools(services.tokenizer, services.encoder, services.chat)
        tools = await asyncio.to_thread(make_tools, base, writing)
        services.settings.keep_tools(writing, tools)
    return tools


def find_tokens(tokenizer: Any, names: tuple[str, ...]) -> tuple[list[int], str | None]:
    """Ids of tokens by their text; and the first text that is no token, if one is none."""
    found: list[int] = []
    for name in names:
        token = tokenizer.convert_tokens_to_ids(name)
        if token is None or tokenizer.convert_ids_to_tokens(token) != name:
            return found, name
        found.append(token)
    return found, None


def no_token(name: str) -> str:
    """What is wrong with a name in `stop_tokens`, for messages."""
    return f"{name[:50]!r} in stop_tokens, which is no token of the tokenizer"
