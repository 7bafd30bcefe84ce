"""`/v1/responses`: OpenAI's Responses API. Nothing is stored but recent output items, in memory, to be referred to."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count
from typing import Any

from fastapi import APIRouter, Request, Response

from lora_serve.api import error_handlers
from lora_serve.api.adapter_settings import AdaptedCall
from lora_serve.api.auth import Authorized
from lora_serve.api.caller import Caller
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.chat_call import ChatCall, prepare_chat
from lora_serve.api.openai.chat_schemas import ChatCompletion
from lora_serve.api.openai.choices import Choice, ChoiceOutput, RunningCall
from lora_serve.api.openai.documented_bodies import EVENT_STREAM
from lora_serve.api.openai.respond import model_fields, respond
from lora_serve.api.openai.response_events import ResponseOutput
from lora_serve.api.openai.response_logprobs import TokenTexts
from lora_serve.api.openai.response_object import ResponseObject
from lora_serve.api.openai.response_schemas import CreateResponse
from lora_serve.api.openai.response_translation import response_error, to_chat_completion
from lora_serve.api.openapi import errors
from lora_serve.api.services import ServicesDep
from lora_serve.api.sse import StreamFormat
from lora_serve.errors import ServeError

# Fields of a response about what only OpenAI's servers do; always null.
OPENAI_ONLY = (
    "access_programs", "image", "input_transformations", "moderation", "prompt_cache_diagnostics",
    "prompt_cache_options", "tool_usage",
)  # fmt: skip

router = APIRouter(tags=["openai"], route_class=JSONRoute)


class ResponseNotFound(ServeError):
    """A response is asked for later: none is stored."""

    kind = "response_not_found"


def _stream_error(error: ServeError) -> dict[str, Any]:
    """The event for a bug in the middle of a stream; for other errors there is `response.failed`.

    The documented event has its fields at the top; OpenAI's SDK raises an exception for those in `error`.
    """
    told = {"code": error.kind, "message": error.message, "param": error.param}
    return {"type": "error", "sequence_number": 0, **told, **error_handlers.body(error)}


EVENTS = StreamFormat(named=True, done=None, error=_stream_error)


@router.post(
    "/v1/responses",
    response_class=Response,
    responses={
        200: {
            "description": "The response, or its stream events",
            "model": ResponseObject,
            "content": EVENT_STREAM,
        },
        **errors(404, 422, 429),
    },
)
async def create_response(
    body: CreateResponse, request: Request, services: ServicesDep, caller: Authorized
) -> Response:
    """Generate a response to an input; streamed if requested.

    Responses are not stored. Their output items are kept in memory for a while, unless `store` is false, so that
    an input may refer to them.
    """
    chat = to_chat_completion(body, lambda id_: services.items.find(caller.name, id_))
    try:
        return await respond(
            request,
            chat,
            services,
            caller,
            "responses",
            lambda adapted: _prepare(body, chat, adapted, caller),
            EVENTS,
        )
    except ServeError as error:
        raise response_error(error) from None


@router.get("/v1/responses/{response_id}", include_in_schema=False)
@router.delete("/v1/responses/{response_id}", include_in_schema=False)
@router.post("/v1/responses/{response_id}/cancel", include_in_schema=False)
@router.get("/v1/responses/{response_id}/input_items", include_in_schema=False)
async def find_response(response_id: str, caller: Authorized) -> Response:
    """404: responses are not stored."""
    raise ResponseNotFound("this server stores no responses, so there is none of this id", param="response_id")


@dataclass(frozen=True)
class ResponseCall:
    """A `ChatCall` whose response has the form of OpenAI's Responses."""

    body: CreateResponse
    call: ChatCall
    texts: TokenTexts
    keep: Callable[[list[dict[str, Any]]], None]  # of output items

    @property
    def choices(self) -> list[Choice]:
        return self.call.choices

    def full_response(self, running: RunningCall, outputs: list[ChoiceOutput]) -> dict[str, Any]:
        """The response body without streaming."""
        (whole,) = outputs
        output = self.output()
        for each in self.call.replay(whole):
            output.write(each)
        return self.finished(running, output)

    async def chunks(self, running: RunningCall) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed response; the first come with the first token."""
        numbers = count()
        async with aclosing(self._events(running)) as events:
            async for event in events:
                yield {"type": event["type"], "sequence_number": next(numbers), **event}

    async def _events(self, running: RunningCall) -> AsyncGenerator[dict[str, Any], None]:
        output = self.output()
        begin = [
            {"type": kind, "response": self.response(running, "in_progress")}
            for kind in ("response.created", "response.in_progress")
        ]
        try:
            async with aclosing(self.call.outputs(running)) as outputs:
                async for each in outputs:
                    for event in (*begin, *output.write(each)):
                        yield event
                    begin = []
        except ServeError as error:
            for event in (*begin, *output.close("incomplete")):
                yield event
            yield {"type": "response.failed", "response": self.failed(running, output, error)}
        else:
            response = self.finished(running, output)
            yield {"type": f"response.{response['status']}", "response": response}

    def output(self) -> ResponseOutput:
        return ResponseOutput(self.texts, self.body.top_logprobs or 0)

    def finished(self, running: RunningCall, output: ResponseOutput) -> dict[str, Any]:
        """The response object of a reply that came to its end."""
        self.keep(output.items)
        response = self.response(running, "completed")
        if output.finish_reason == "length":
            response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            response["completed_at"] = int(time.time())
        return response | {"output": output.items, "usage": self.usage(output)}

    def failed(self, running: RunningCall, output: ResponseOutput, error: ServeError) -> dict[str, Any]:
        """The response object of a reply that an error ended."""
        status = error_handlers.status(error)
        code = "rate_limit_exceeded" if status == 429 else "server_error" if status >= 500 else "invalid_prompt"
        ended = {"output": output.items, "error": {"code": code, "message": error.message}}
        return self.response(running, "failed") | ended

    def response(self, running: RunningCall, status: str) -> dict[str, Any]:
        """The response object without output, with the parameters in effect."""
        sampling = self.choices[0].request.sampling
        return {
            "id": self.call.id,
            "object": "response",
            "created_at": self.call.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            **model_fields(running.adapters, self.call.model),
            "output": [],
            "usage": None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **echoed(self.body),
        }

    def usage(self, output: ResponseOutput) -> dict[str, Any]:
        prompt = self.call.prompt_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": output.cached, "cache_write_tokens": 0},
            "output_tokens": output.generated,
            "output_tokens_details": {"reasoning_tokens": output.reasoning},
            "total_tokens": prompt + output.generated,
        }


def echoed(body: CreateResponse) -> dict[str, Any]:
    """A body's parameters as its response repeats them, with the defaults of those left out."""
    sent = body.model_dump(include={"tools", "tool_choice", "text", "reasoning"}, exclude_none=True, by_alias=True)
    tools = [{"description": None, "parameters": None, "strict": False, **tool} for tool in sent.get("tools", ())]
    text, reasoning = sent.get("text", {}), sent.get("reasoning", {})
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "tools": tools,
        "tool_choice": sent.get("tool_choice", "auto"),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | text,
        "reasoning": {"effort": None, "summary": None} | reasoning,
        "top_logprobs": body.top_logprobs or 0,
        "metadata": body.metadata or {},
        "store": body.store is not False,
        "background": False,
        "truncation": "disabled",
        "service_tier": "default",
        "max_tool_calls": body.max_tool_calls,
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": body.prompt_cache_retention,
        "previous_response_id": None,
        "conversation": None,
        "prompt": None,
    } | dict.fromkeys(OPENAI_ONLY)


async def _prepare(
    body: CreateResponse,
    chat: ChatCompletion,
    adapted: AdaptedCall,
    caller: Caller,
) -> ResponseCall:
    call = await prepare_chat(chat, adapted, caller, prefix="resp_")
    services = adapted.services

    def keep(items: list[dict[str, Any]]) -> None:
        if body.store is not False:
            services.items.remember(caller.name, items)

    return ResponseCall(body, call, TokenTexts(services.tokenizer), keep)
