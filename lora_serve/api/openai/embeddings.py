"""`POST /v1/embeddings`: texts or token ids to vectors, by bases and adapters that are made for it.

Every input is an engine request of its own. A call with many inputs has only some of them in the engine at a time, so
that it does not fill the queue by itself.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from lora_serve.api.auth import Authorized
from lora_serve.api.caller import Caller
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.choices import requests_at_once
from lora_serve.api.openai.documented_bodies import EmbeddingReply
from lora_serve.api.openai.encode import TextTooLong
from lora_serve.api.openai.preprocess import (
    check_tokens,
    context_exceeded,
    engine_info,
    explain_not_found,
    resolve_adapters,
    text_too_long,
    vocabulary_size,
)
from lora_serve.api.openai.respond import model_fields
from lora_serve.api.openai.routing import routing_of
from lora_serve.api.openai.schemas import EmbeddingBody
from lora_serve.api.openapi import errors
from lora_serve.api.quotas import QuotaUse
from lora_serve.api.request_record import RequestRecord, record_of
from lora_serve.api.services import Services, ServicesDep
from lora_serve.api.sse import FastJSONResponse, cancel_on_disconnect
from lora_serve.errors import AdapterNotFound, BadRequest, EngineFault, ServeError, Unavailable
from lora_serve.metrics import Timer
from lora_serve.request import AdapterUse, Admitted, Embedded, EmbeddingParams, Finished, Sampling, Served
from lora_serve.request import Request as EngineRequest

router = APIRouter(tags=["openai"], route_class=JSONRoute)

Embedding = tuple[bytes, list[Served]]  # float32 little-endian, and the adapters that made it


@router.post(
    "/v1/embeddings", response_class=Response, responses={200: {"model": EmbeddingReply}, **errors(404, 422, 429)}
)
async def embed(body: EmbeddingBody, request: Request, services: ServicesDep, caller: Authorized) -> Response:
    """Embed each input."""
    try:
        await services.trained.publish_checkpoint(body.model, caller)
        uses = resolve_adapters(body, services, caller)
        with services.quotas.use(caller, [use.name for use in uses], record_of(request.scope)) as quota:
            response = await _respond(body, request, services, caller, uses, quota)
        response.headers.update(quota.headers)
        return response
    except AdapterNotFound as error:
        raise await explain_not_found(error, body, services, caller) from None


async def _respond(
    body: EmbeddingBody,
    request: Request,
    services: Services,
    caller: Caller,
    uses: tuple[AdapterUse, ...],
    quota: QuotaUse,
) -> Response:
    requests = await cancel_on_disconnect(request.receive, _prepare(body, request, services, caller, uses))
    timer = services.metrics.begin("embeddings")
    tokens = sum(len(each.prompt) for each in requests)
    try:
        embeddings = await cancel_on_disconnect(
            request.receive, _embed_all(services, requests, timer, record_of(request.scope), quota)
        )
        timer.end("stop", tokens, 0)
    except ServeError as error:
        timer.end(error.kind, 0, 0)
        raise
    finally:
        timer.end("abort", 0, 0)
    encode = _base64 if body.encoding_format == "base64" else _floats
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, (vector, _) in enumerate(embeddings)
    ]
    return FastJSONResponse(
        {"object": "list", "data": data}
        | model_fields(embeddings[0][1], engine_info(services).model)
        | {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    )


async def _prepare(
    body: EmbeddingBody, http: Request, services: Services, caller: Caller, uses: tuple[AdapterUse, ...]
) -> list[EngineRequest]:
    """The engine's request for each input. Raises BadRequest and ContextExceeded that name the field."""
    info = engine_info(services)
    if body.dimensions is not None and body.dimensions > info.hidden_size:
        raise BadRequest(f"an embedding has {info.hidden_size} dimensions", param="dimensions")
    prompts = await _prompts(body, services)
    for prompt in prompts:
        if len(prompt) > info.max_model_len:
            raise context_exceeded(info, len(prompt), 0, "input")
    id_, params, priority = f"embd-{uuid.uuid4().hex}", EmbeddingParams(body.dimensions), body.priority or 0
    routing = routing_of(http, id_, body.user, services)
    return [
        EngineRequest(
            f"{id_}-{index}", prompt, Sampling(max_tokens=0), uses, caller.name, params, priority, caller.share, routing
        )
        for index, prompt in enumerate(prompts)
    ]


async def _prompts(body: EmbeddingBody, services: Services) -> list[list[int]]:
    """Token ids of every input, truncated if asked for."""
    limit = body.truncate_prompt_tokens
    longest = engine_info(services).max_model_len
    if limit is not None and limit > longest:
        raise BadRequest(f"truncate_prompt_tokens is more than the context ({longest})", param="truncate_prompt_tokens")
    limit = longest if limit == -1 else limit
    one = isinstance(body.input, str) or isinstance(body.input[0], int)
    given: list[Any] = [body.input] if one else [*body.input]
    if isinstance(given[0], str):
        prompts = await _tokenize(services, given, limit, special=body.add_special_tokens is not False)
        if not all(prompts):
            raise BadRequest("an input has no tokens", param="input")
        return prompts
    for prompt in given:
        check_tokens(prompt, vocabulary_size(body, services), "input")
    return [prompt[:limit] for prompt in given]


async def _tokenize(services: Services, texts: list[str], limit: int | None, *, special: bool) -> list[list[int]]:
    info = engine_info(services)
    try:
        if limit is None:
            return await services.encoder.encode(texts, info.max_model_len, add_special_tokens=special)
        return await services.encoder.encode_first(texts, limit, add_special_tokens=special)
    except TextTooLong:
        raise text_too_long(info, "input") from None
    except ValueError as error:
        raise BadRequest(f"truncate_prompt_tokens: {error}", param="truncate_prompt_tokens") from None


async def _embed_all(
    services: Services, requests: Sequence[EngineRequest], timer: Timer, record: RequestRecord, quota: QuotaUse
) -> list[Embedding]:
    """Run all requests; their embeddings in order. Raises the first `ServeError`, and then aborts the rest."""
    running = asyncio.Semaphore(requests_at_once(services))

    async def embed_one(request: EngineRequest) -> Embedding:
        async with running:
            try:
                return await _embed(services, request, timer, record, quota)
            except AdapterNotFound:
                if not await services.sources.fetch_missing([use.name for use in request.adapters], request.tenant):
                    raise
                return await _embed(services, request, timer, record, quota)

    tasks = [asyncio.ensure_future(embed_one(request)) for request in requests]
    try:
        embeddings = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if any(adapters != embeddings[0][1] for _, adapters in embeddings):
        raise Unavailable("the adapter was replaced while the inputs were embedded; ask again", retry_after=1)
    return embeddings


async def _embed(
    services: Services, request: EngineRequest, timer: Timer, record: RequestRecord, quota: QuotaUse
) -> Embedding:
    vector: bytes | None = None
    adapters: list[Served] = []
    record.sending()
    async with aclosing(services.engine.generate(request)) as events:
        async for event in events:
            match event:
                case Admitted():
                    adapters = event.adapters
                    record.admitted(request, adapters)
                    quota.count([adapter.name for adapter in adapters])
                    if adapters:
                        timer.admitted(adapters[0].name)
                case Embedded():
                    vector = event.vector
                case Finished() if event.failure is not None:
                    raise event.failure.error()
                case _:
                    pass
    if vector is None:
        raise EngineFault("the request was ended by the server")
    return vector, adapters


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def _floats(vector: bytes) -> list[float]:
    return [*struct.unpack(f"<{len(vector) // 4}f", vector)]
