"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: the base's tokenizer, which is that of every adapter.

An adapter may have a vocabulary of another size; that decides which token ids there are.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import model_validator

from lora_serve.api.auth import Authorized
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.chat_prompt import encode_chat
from lora_serve.api.openai.chat_schemas import Messages
from lora_serve.api.openai.preprocess import check_tokens, encode, engine_info, existing_adapters
from lora_serve.api.openai.schemas import ModelSelection, Text, TokenIds
from lora_serve.api.services import ServicesDep

router = APIRouter(tags=["tokenizer"], route_class=JSONRoute)


class Tokenize(ModelSelection):
    """Body of `POST /tokenize`: a prompt, or messages for the chat template."""

    prompt: Text | None = None
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

    tokens: TokenIds


@router.post("/tokenize")
async def tokenize(body: Tokenize, services: ServicesDep, caller: Authorized) -> dict[str, Any]:
    """Token ids of a text or of messages."""
    await existing_adapters(body, services, caller)
    if body.messages is not None:
        chat = await encode_chat(services, body.messages, add_generation_prompt=body.add_generation_prompt is not False)
        tokens = chat.tokens
    else:
        special = body.add_special_tokens is not False
        tokens = await encode(services, body.prompt or "", add_special_tokens=special)
    return {"count": len(tokens), "max_model_len": engine_info(services).max_model_len, "tokens": tokens}


@router.post("/detokenize")
async def detokenize(body: Detokenize, services: ServicesDep, caller: Authorized) -> dict[str, Any]:
    """Text of token ids."""
    adapters = await existing_adapters(body, services, caller)
    sizes = (adapter.versions[0].vocab_size for adapter in adapters)
    check_tokens(body.tokens, next((size for size in sizes if size), engine_info(services).vocab_size), "tokens")
    return {"prompt": services.tokenizer.decode(body.tokens)}


@router.get("/tokenizer_info")
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
