"""Respond to an API call: run its choices, and build the whole response or a stream from their outputs."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol

from fastapi import Request, Response

from lora_serve.api.adapter_settings import AdaptedCall, adapt
from lora_serve.api.caller import Caller
from lora_serve.api.openai.choices import Choice, ChoiceOutput, RunningCall, collect_outputs, start_choices
from lora_serve.api.openai.preprocess import explain_not_found, resolve_adapters
from lora_serve.api.openai.routing import routing_of
from lora_serve.api.openai.schemas import Generation, StreamOptions
from lora_serve.api.request_record import record_of
from lora_serve.api.services import Services
from lora_serve.api.sse import CHUNKS, FastJSONResponse, SSEResponse, StreamFormat, cancel_on_disconnect
from lora_serve.errors import AdapterNotFound, SettingsNotApplied
from lora_serve.request import AdapterUse, Routing, Served

ATTEMPTS = 4  # at a call whose adapters are replaced while it begins


class ApiCall(Protocol):
    """One API call: its choices, and how its response is built."""

    @property
    def choices(self) -> list[Choice]: ...

    def full_response(self, running: RunningCall, outputs: list[ChoiceOutput]) -> dict[str, Any]:
        """The response body without streaming."""

    def chunks(self, running: RunningCall) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response."""


async def respond(
    http: Request,
    body: Generation,
    services: Services,
    caller: Caller,
    endpoint: str,
    prepare: Callable[[AdaptedCall], Awaitable[ApiCall]],
    format: StreamFormat = CHUNKS,
) -> Response:
    """Run a call and respond, streamed if requested. Raises the `ServeError` that refuses it; `ClientDisconnected`.

    Args:
        body: of it only what selects the model and how to answer.
        prepare: makes the call by the settings of the adapters that the body names; more than once if those change.
    """
    record = record_of(http.scope)
    async with AsyncExitStack() as stack:
        try:
            await services.trained.publish_checkpoint(body.model, caller)
            uses = resolve_adapters(body, services, caller)
            quota = stack.enter_context(services.quotas.use(caller, [use.name for use in uses], record))
            call, running = await _start(http, body, services, uses, endpoint, prepare, stack)
            quota.count([adapter.name for adapter in running.adapters])
        except AdapterNotFound as error:
            raise await explain_not_found(error, body, services, caller) from None
        if not body.stream:
            outputs = await cancel_on_disconnect(http.receive, collect_outputs(running))
            return FastJSONResponse(call.full_response(running, outputs), headers=quota.headers)
        return SSEResponse(call.chunks(running), stack.pop_all(), format, quota.headers)


async def _start(
    http: Request,
    body: Generation,
    services: Services,
    uses: tuple[AdapterUse, ...],
    endpoint: str,
    prepare: Callable[[AdaptedCall], Awaitable[ApiCall]],
    stack: AsyncExitStack,
) -> tuple[ApiCall, RunningCall]:
    """Prepare and start a call; again if what its adapters ask for changed meanwhile."""

    def alias_routing() -> Routing:
        return routing_of(http, uuid.uuid4().hex, body.user, services)

    async def prepared() -> tuple[AdaptedCall, ApiCall]:
        adapted = await adapt(uses, services, alias_routing, chat=endpoint != "completions")
        return adapted, await prepare(adapted)

    for attempt in range(ATTEMPTS):
        adapted, call = await cancel_on_disconnect(http.receive, prepared())
        routing = routing_of(http, call.choices[0].request.id, body.user, services)
        started = start_choices(adapted.services, endpoint, call.choices, record_of(http.scope), routing)
        try:
            return call, await cancel_on_disconnect(http.receive, stack.enter_async_context(started))
        except (SettingsNotApplied, AdapterNotFound) as error:
            changed = isinstance(error, SettingsNotApplied) or adapted.uses != uses
            if not changed or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def model_fields(adapters: Sequence[Served], base: str) -> dict[str, Any]:
    """The response fields `model`, and `adapter` with the exact version; no `adapter` for the base."""
    if not adapters:
        return {"model": base}
    versions = [f"{adapter.name}@{adapter.digest[:12]}" for adapter in adapters]
    return {
        "model": "+".join(adapter.name for adapter in adapters),
        "adapter": versions[0] if len(versions) == 1 else versions,
    }


def add_usage(
    chunk: dict[str, Any], options: StreamOptions | None, usage_so_far: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A stream chunk with the usage that `stream_options` asks for."""
    if options is not None and options.continuous_usage_stats:
        return chunk | {"usage": usage_so_far()}
    if options is not None and options.include_usage:
        return chunk | {"usage": None}
    return chunk


def usage(prompt_tokens: int, completion_tokens: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
