"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from lora_serve.api.adapter_settings import AdaptedCall
from lora_serve.api.auth import Authorized
from lora_serve.api.caller import Caller
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.choices import Choice, ChoiceOutput, RunningCall, make_choices
from lora_serve.api.openai.documented_bodies import EVENT_STREAM, CompletionReply
from lora_serve.api.openai.preprocess import (
    check_n,
    check_tokens,
    context_exceeded,
    encode,
    engine_info,
    sampling_params,
    vocabulary_size,
)
from lora_serve.api.openai.respond import add_usage, model_fields, respond, usage
from lora_serve.api.openai.response_logprobs import TokenTexts, completion_logprobs
from lora_serve.api.openai.schemas import Completion
from lora_serve.api.openai.structured_output import check_copies, structured_output
from lora_serve.api.openapi import errors
from lora_serve.api.services import Services, ServicesDep
from lora_serve.errors import BadRequest
from lora_serve.request import Logprob

router = APIRouter(tags=["openai"], route_class=JSONRoute)
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post(
    "/v1/completions",
    response_class=Response,
    responses={200: {"model": CompletionReply, "content": EVENT_STREAM}, **errors(404, 422, 429)},
)
async def complete(body: Completion, request: Request, services: ServicesDep, caller: Authorized) -> Response:
    """Complete each prompt; streamed if requested."""
    return await respond(
        request, body, services, caller, "completions", lambda adapted: _prepare(body, adapted, caller)
    )


@dataclass(frozen=True)
class CompletionCall:
    """One API call: its choices, and how its response is built."""

    body: Completion
    id: str
    created: int
    model: str
    choices: list[Choice]
    prompts: list[list[int]]
    echoes: list[str]
    texts: TokenTexts

    def full_response(self, running: RunningCall, outputs: list[ChoiceOutput]) -> dict[str, Any]:
        """The response body without streaming."""
        offsets = {output.index: 0 for output in outputs}
        shown = [self.choice(output, offsets, first=True) for output in outputs]
        cached = sum(outputs[index * self.n].cached for index in range(len(self.prompts)))
        total = usage(sum(map(len, self.prompts)), sum(output.generated for output in outputs), cached)
        return self.frame(running) | {"choices": shown, "usage": total}

    async def chunks(self, running: RunningCall) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response."""
        options = self.body.stream_options
        frame = self.frame(running)
        offsets = {choice.index: 0 for choice in self.choices}
        begun: set[int] = set()
        generated = dict.fromkeys(offsets, 0)
        cached = dict.fromkeys(offsets, 0)
        prompt_tokens = sum(map(len, self.prompts))

        def usage_so_far() -> dict[str, Any]:
            found = sum(cached[index] for index in offsets if index % self.n == 0)
            return usage(prompt_tokens, sum(generated.values()), found)

        async for output in running.outputs():
            generated[output.index] = output.generated
            cached[output.index] = max(cached[output.index], output.cached)
            first = output.index not in begun
            begun.add(output.index)
            shown = self.choice(output, offsets, first=first)
            if not (shown["text"] or output.tokens or output.finish_reason):
                continue
            yield add_usage(frame | {"choices": [shown]}, options, usage_so_far)
        if options is not None and options.include_usage:
            yield frame | {"choices": [], "usage": usage_so_far()}

    def frame(self, running: RunningCall) -> dict[str, Any]:
        frame = {"id": self.id, "object": "text_completion", "created": self.created}
        return frame | model_fields(running.adapters, self.model)

    def choice(self, output: ChoiceOutput, offsets: dict[int, int], *, first: bool) -> dict[str, Any]:
        """JSON of one output; with `first`, after the echoed prompt. `offsets`: length of the text sent so far."""
        echo = bool(self.body.echo) and first
        prompt = output.index // self.n
        text = self.echoes[prompt] + output.text if echo else output.text
        logprobs = None
        if self.body.logprobs is not None:
            tokens = output.tokens
            entries: list[Logprob | None] = [*output.logprobs]
            if echo:
                tokens = [*self.prompts[prompt], *tokens]
                entries = [*(output.prompt_logprobs or []), *entries]
            start = offsets[output.index]
            logprobs = completion_logprobs(self.texts, entries, tokens, self.body.logprobs, start)
            offsets[output.index] = start + sum(len(self.texts.text(token)) for token in tokens)
        return {"index": output.index, "text": text, "logprobs": logprobs, "finish_reason": output.finish_reason}

    @property
    def n(self) -> int:
        return self.body.n or 1


async def _prepare(body: Completion, adapted: AdaptedCall, caller: Caller) -> CompletionCall:
    services, body = adapted.services, adapted.complete(body)
    check_n(body, services)
    grammar = await structured_output(body)
    texts, prompts = await _prompts(body, services)
    check_copies(grammar, len(prompts) * (body.n or 1))
    logprobs = body.logprobs
    id_ = f"cmpl-{uuid.uuid4().hex}"
    choices: list[Choice] = []
    for prompt in prompts:
        if not prompt:
            raise BadRequest("the prompt has no tokens", param="prompt")
        params = sampling_params(
            body,
            services,
            prompt_tokens=len(prompt),
            max_tokens=body.max_tokens,
            default_max_tokens=adapted.max_tokens(body.max_tokens) or DEFAULT_MAX_TOKENS,
            field="prompt",
            logprobs=logprobs,
            prompt_logprobs=logprobs if body.echo else None,
            grammar=grammar,
        )
        choices += make_choices(body, id_, len(choices), prompt, params, adapted.uses, caller)
    model = engine_info(services).model
    return CompletionCall(body, id_, int(time.time()), model, choices, prompts, texts, TokenTexts(services.tokenizer))


async def _prompts(body: Completion, services: Services) -> tuple[list[str], list[list[int]]]:
    """Text (for echo) and token ids of every prompt."""
    info = engine_info(services)
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    given: list[Any] = [body.prompt] if one else [*body.prompt]
    if isinstance(given[0], str):
        return given, await encode(services, given, "prompt", add_special_tokens=body.add_special_tokens is not False)
    for prompt in given:
        if len(prompt) > info.max_model_len:
            raise context_exceeded(info, len(prompt), 0, "prompt")
        check_tokens(prompt, vocabulary_size(body, services), "prompt")
    if not body.echo:
        return [""] * len(given), given

    def decode() -> list[str]:
        return [services.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in given]

    return await services.encoder.run(decode, sum(map(len, given))), given
