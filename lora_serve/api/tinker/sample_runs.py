"""Samples: prompts of sampling sessions, run on the engine beside each other, with results that are asked for later."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import ExitStack
from typing import Any

import msgspec

from lora_serve.api.caller import Caller
from lora_serve.api.openai.choices import Choice, ChoiceOutput, collect_outputs, requests_at_once, start_choices
from lora_serve.api.openai.preprocess import check_tokens, context_exceeded, engine_info
from lora_serve.api.request_record import RequestRecord
from lora_serve.api.services import Services
from lora_serve.api.tinker.future_results import PROTOBUF, FutureResult, FutureResults
from lora_serve.api.tinker.sample_codec import SampleOutput, encode_samples
from lora_serve.api.tinker.sampling_sessions import SamplingSession
from lora_serve.api.tinker.tinker_bodies import SampleBody
from lora_serve.api.tinker.tinker_errors import TooMuchWaits
from lora_serve.engine.detokenizer import Detokenizer
from lora_serve.errors import BadRequest, EngineFault, Overloaded, ServeError, Unavailable
from lora_serve.request import AdapterUse, Request, Routing, Sampling

MOST_WAITING = 4096  # requests of all keys; clients send others again
TRIES = 20  # of a request that the engine does not take
PAUSE = 1.0  # seconds before it is tried again; a restart of the engine may take longer than all of them
START_SECONDS = 600.0
ENDPOINT = "tinker"

log = logging.getLogger(__name__)


class SampleRuns:
    """Runs the samples of all keys."""

    def __init__(self, services: Services, futures: FutureResults) -> None:
        self._services, self._futures = services, futures
        self._running: dict[str, asyncio.Task[None]] = {}
        self._at_once = asyncio.Semaphore(requests_at_once(services))

    def __repr__(self) -> str:
        return f"<SampleRuns {len(self._running)} running or waiting>"

    def accept(self, id_: str, body: SampleBody, sampler: SamplingSession, caller: Caller) -> None:
        """Begin a request, unless it was begun before.

        Raises TooMuchWaits, RateLimited: it is to be sent again. What else is wrong becomes its result.
        """
        if self._futures.expects(id_):
            return
        if len(self._running) >= MOST_WAITING:
            raise TooMuchWaits("too many samples wait already", retry_after=1)
        record = RequestRecord()
        with ExitStack() as stack:
            stack.enter_context(self._services.quotas.use(caller, [sampler.adapter] if sampler.adapter else [], record))
            self._futures.open(id_, caller.owner)
            held = stack.pop_all()
        task = asyncio.create_task(self._run(id_, body, sampler, caller, record, held))
        self._running[id_] = task
        task.add_done_callback(lambda _: self._running.pop(id_, None))

    def cancel(self, id_: str) -> None:
        """Abort a request if it runs."""
        if (task := self._running.get(id_)) is not None:
            task.cancel()

    async def close(self) -> None:
        """Abort all."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(
        self,
        id_: str,
        body: SampleBody,
        sampler: SamplingSession,
        caller: Caller,
        record: RequestRecord,
        held: ExitStack,
    ) -> None:
        result = FutureResult.failed(EngineFault("the request was aborted"))
        try:
            choices = self._choices(body, sampler, caller)
            result = FutureResult(PROTOBUF, await self._sample(choices, body, record))
        except ServeError as error:
            result = FutureResult.failed(error)
        except Exception:
            log.exception("a sample failed")
            result = FutureResult.failed(EngineFault("the server failed on this request"))
        finally:
            held.close()
            self._futures.finish(id_, result)
            if record.prompt_tokens:
                named = sampler.model_id or record.adapter_names  # ephemeral weights have a new name each time
                self._services.usage.add(caller.name, named, record.prompt_tokens, record.completion_tokens)

    async def _sample(self, choices: list[Choice], body: SampleBody, record: RequestRecord) -> bytes:
        for left in reversed(range(TRIES)):
            try:
                async with self._at_once:
                    started = start_choices(self._services, ENDPOINT, choices, record, Routing())
                    async with started as running:
                        outputs = await collect_outputs(running)
                return self._encode(body, choices, outputs)
            except (Overloaded, Unavailable):
                if not left:
                    raise
                await self._until_ready()
        raise AssertionError

    async def _until_ready(self) -> None:
        await asyncio.sleep(PAUSE)
        waited = 0.0
        while not self._services.engine.ready and waited < START_SECONDS:
            await asyncio.sleep(0.2)
            waited += 0.2

    def _choices(self, body: SampleBody, sampler: SamplingSession, caller: Caller) -> list[Choice]:
        """The samples of one prompt. Raises `BadRequest`, `ContextExceeded`."""
        info = engine_info(self._services)
        given = body.sampling_params
        prompt = [token for chunk in body.prompt.chunks for token in chunk.tokens]
        if not prompt:
            raise BadRequest("the prompt has no tokens", param="prompt")
        check_tokens(prompt, info.vocab_size, "prompt")
        remaining = info.max_model_len - len(prompt)
        if remaining < 1:
            raise context_exceeded(info, len(prompt), given.max_tokens or 1, "prompt")
        texts, tokens = _stops(given.stop)
        check_tokens(tokens, info.vocab_size, "stop")
        top = body.topk_prompt_logprobs if body.prompt_logprobs or body.topk_prompt_logprobs else None
        params = Sampling(
            max_tokens=min(given.max_tokens or remaining, remaining),
            temperature=given.temperature,
            top_k=max(0, given.top_k),
            top_p=given.top_p,
            stop_token_ids=tuple(tokens),
            ignore_eos=given.stop == [],
            logprobs=body.topk_sample_logprobs,
        )
        uses = (AdapterUse(sampler.adapter, sampler.digest),) if sampler.adapter else ()
        call = f"tinker-{uuid.uuid4().hex}"
        choices = []
        for index in range(body.num_samples):
            seed = None if given.seed is None else given.seed + index
            own = msgspec.structs.replace(params, seed=seed, prompt_logprobs=top if index == 0 else None)
            request = Request(f"{call}-{index}", prompt, own, uses, caller.name, weight=caller.share)
            choices.append(Choice(index, request, texts, include_stop=True, hidden=frozenset()))
        return choices

    def _encode(self, body: SampleBody, choices: list[Choice], outputs: list[ChoiceOutput]) -> bytes:
        first = outputs[0]
        wanted = bool(body.prompt_logprobs or body.topk_prompt_logprobs)
        return encode_samples(
            [self._output(choice, output) for choice, output in zip(choices, outputs, strict=True)],
            top=body.topk_sample_logprobs,
            prompt=(first.prompt_logprobs or []) if wanted else None,
            prompt_top=body.topk_prompt_logprobs,
            last=body.prompt_logprobs_last_n,
            cached=first.cached,
        )

    def _output(self, choice: Choice, output: ChoiceOutput) -> SampleOutput:
        """A sequence up to the token that completes a stop string; more may have come together with that one."""
        count = len(output.tokens)
        if output.stop_string is not None:
            text = Detokenizer(self._services.tokenizer, choice.request.prompt, choice.stop, hidden=choice.hidden)
            for place, token in enumerate(output.tokens):
                text.feed([token])
                if text.stopped:
                    count = place + 1
                    break
        return SampleOutput(output.tokens[:count], output.logprobs[:count], output.finish_reason == "stop")


def _stops(stop: Any) -> tuple[tuple[str, ...], list[int]]:
    """Texts and tokens that end a sequence."""
    if stop is None:
        return (), []
    if isinstance(stop, str):
        return (stop,), []
    texts = tuple(each for each in stop if isinstance(each, str) and each)
    return texts, [each for each in stop if isinstance(each, int)]
