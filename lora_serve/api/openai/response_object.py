"""The response object of `/v1/responses`, as strict pydantic models for the OpenAPI schema."""

from __future__ import annotations

from typing import Literal

from lora_serve.api.openai.response_input import FunctionCallItem, MessageItem, OutputTextPart, ReasoningItem
from lora_serve.api.openai.response_schemas import (
    AllowedFunctions,
    NamedFunctionChoice,
    ReasoningConfig,
    ResponseFunction,
    TextConfig,
)
from lora_serve.api.openai.schemas import Strict


class AnswerItem(MessageItem):
    """A generated message."""

    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputTextPart]  # type: ignore[assignment]


class ResponseFailure(Strict):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(Strict):
    reason: Literal["max_output_tokens"]


class InputTokensDetails(Strict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Strict):
    reasoning_tokens: int


class ResponseUsage(Strict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(Strict):
    """A generated response, with the parameters in effect. `adapter` is `name@digest`, or several; absent for the base.

    Of a stream's first events, `status` is `in_progress`, and `output` and `usage` are still to come.
    """

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    adapter: str | list[str] | None = None
    output: list[AnswerItem | ReasoningItem | FunctionCallItem]
    usage: ResponseUsage | None
    instructions: str | None
    temperature: float
    top_p: float
    max_output_tokens: int | None
    tools: list[ResponseFunction]
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionChoice | AllowedFunctions
    parallel_tool_calls: bool
    text: TextConfig
    reasoning: ReasoningConfig
    top_logprobs: int
    metadata: dict[str, str]
    store: bool
    background: Literal[False]
    truncation: Literal["disabled"]
    service_tier: Literal["default"]
    max_tool_calls: int | None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    previous_response_id: None
    conversation: None
    prompt: None
    access_programs: None
    image: None
    input_transformations: None
    moderation: None
    prompt_cache_diagnostics: None
    prompt_cache_options: None
    tool_usage: None
