"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: the base's tokenizer, which is that of every adapter.

An adapter may have a vocabulary of another size; that decides which token ids there are. Its settings may add tokens
and have a chat template.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field, model_validator

from lora_serve.api.adapter_settings import adapt_prompt
from lora_serve.api.auth import Authorized
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.chat_prompt import encode_chat
from lora_serve.api.openai.chat_schemas import Messages
from lora_serve.api.openai.documented_bodies import DetokenizeReply, TokenizeReply, TokenizerInfo
from lora_serve.api.openai.preprocess import check_tokens, engine_info, existing_adapters
from lora_serve.api.openai.schemas import ModelSelection, TokenIds
from lora_serve.api.openapi import errors
from lora_serve.api.services import Services, ServicesDep
from lora_serve.api.sse import FastJSONResponse

router = APIRouter(tags=["tokenizer"], route_class=JSONRoute)

LONGEST_TEXT = 1_000_000  # characters
MOST_TOKENS = 200_000


class Tokenize(ModelSelection):
    """Body of `POST /tokenize`: a prompt, or messages for the chat template."""

    prompt: Annotated[str, Field(max_length=LONGEST_TEXT)] | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Tokenize:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class Detokenize(ModelSelection):
    """Body of `POST /detokenize`."""

    tokens: Annotated[TokenIds, Field(max_length=MOST_TOKENS)]


@router.post("/tokenize", response_model=TokenizeReply, responses=errors(404))
async def tokenize(body: Tokenize, services: ServicesDep, caller: Authorized) -> Response:
    """Token ids of a text, which may be longer than the context, or of messages, which may not."""
    await existing_adapters(body, services, caller)
    adapted = await adapt_prompt(body, services, caller, chat=body.messages is not None)
    if body.messages is not None:
        chat = await encode_chat(
            adapted.services,
            adapted.with_system(body.messages),
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        tokens = chat.tokens
    else:
        special = body.add_special_tokens is not False
        tokens = await _encode(adapted.services, body.prompt or "", special=special)
    return FastJSONResponse(
        {"count": len(tokens), "max_model_len": engine_info(services).max_model_len, "tokens": tokens}
    )


@router.post("/detokenize", response_model=DetokenizeReply, responses=errors(404))
async def detokenize(body: Detokenize, services: ServicesDep, caller: Authorized) -> Response:
    """Text of token ids."""
    adapters = await existing_adapters(body, services, caller)
    sizes = (adapter.versions[0].vocab_size for adapter in adapters)
    check_tokens(body.tokens, next((size for size in sizes if size), engine_info(services).vocab_size), "tokens")
    tokenizer = (await adapt_prompt(body, services, caller, chat=False)).services.tokenizer
    text = await services.encoder.run(lambda: tokenizer.decode(body.tokens), len(body.tokens))
    return FastJSONResponse({"prompt": text})


@router.get("/tokenizer_info", response_model=TokenizerInfo)
async def tokenizer_info(services: ServicesDep, caller: Authorized) -> dict[str, Any]:
    """Vocabulary size, special tokens and chat template."""
    tokenizer = services.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    }


async def _encode(services: Services, text: str, *, special: bool) -> list[int]:
    """Token ids of a text of any length; an empty one is the BOS token, if the tokenizer has one."""
    (ids,) = await services.encoder.encode([text], LONGEST_TEXT, add_special_tokens=special)
    bos = services.tokenizer.bos_token_id
    return ids or ([] if bos is None else [bos])
