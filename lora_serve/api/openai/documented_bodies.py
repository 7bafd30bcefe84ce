"""Response bodies of OpenAI's API and of the tokenizer routes, as the OpenAPI schema documents them.

Generated responses are built as dicts and not validated; `adapter`, this server's addition, is `name@digest`.
"""

from __future__ import annotations

from typing import Any, Literal

from lora_serve.api.openai.schemas import Strict

EVENT_STREAM: dict[str, Any] = {
    "text/event-stream": {
        "schema": {"type": "string", "description": "with stream: one data event per chunk, and [DONE] at the end"}
    }
}


class CachedTokens(Strict):
    cached_tokens: int


class Usage(Strict):
    """Tokens of a call; the prompt has those that were cached too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class GeneratedReply(Strict):
    """What completions and chat completions have in common. `adapter` is left out for the base."""

    id: str
    created: int
    model: str
    adapter: str | list[str] | None = None
    usage: Usage


class CompletionLogprobs(Strict):
    """Lists with an entry per token; the first token of an echoed prompt has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionReplyChoice(Strict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(GeneratedReply):
    """Response of `POST /v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionReplyChoice]


class TokenLogprob(Strict):
    token: str
    logprob: float
    bytes: list[int]


class GeneratedTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Strict):
    content: list[GeneratedTokenLogprob]


class CalledFunction(Strict):
    name: str
    arguments: str


class GeneratedToolCall(Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Strict):
    """A generated message. Its content is null if it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[GeneratedToolCall] | None = None


class ChatReplyChoice(Strict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatReply(GeneratedReply):
    """Response of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatReplyChoice]


class EmbeddingVector(Strict):
    """An embedding: numbers, or with `encoding_format: base64` their float32 bytes, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Strict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(Strict):
    """Response of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingVector]
    model: str
    adapter: str | list[str] | None = None
    usage: EmbeddingUsage


class ModelCard(Strict):
    """The base, or an adapter with the base as its `parent`. `created` in seconds since the epoch."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Strict):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(Strict):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(Strict):
    prompt: str


class TokenizerInfo(Strict):
    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
