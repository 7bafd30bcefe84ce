"""Bodies and responses of `/v1/messages` as strict pydantic models: whatever Anthropic's SDK or this server produced.

Fields that mean nothing here are accepted. Tools and fields that would change the answer and are not served are refused
with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from lora_serve.api.anthropic.message_blocks import (
    TextBlock,
    TextBlocks,
    ThinkingBlock,
    ToolUseBlock,
    Turn,
)
from lora_serve.api.openai.chat_schemas import MOST_TOOLS, CacheControl, FunctionName
from lora_serve.api.openai.schemas import MOST_STOPS, ModelSelection, Stop, Strict, Text
from lora_serve.api.openai.tagged_unions import LONGEST_KIND, NeverValid, by_kind, kind_of

Nothing = Annotated[list[Any], Field(max_length=0)] | None


class CustomTool(Strict):
    """A tool that the client runs. `input_schema` is a JSON schema."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None  # input is always streamed as it is generated
    defer_loading: Literal[False] | None = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=1, fail_fast=True)] | None = None
    input_examples: Nothing = None


class ServerTool(NeverValid):
    """A tool that Anthropic's servers define or run."""

    @classmethod
    def refusal(cls, value: Any) -> str:
        kind = kind_of(value)[:LONGEST_KIND]
        return f"this server has no tool of type {kind}; give a custom tool with a name and an input_schema"


AnyTool = Annotated[
    Annotated[CustomTool, Tag("custom tool")] | Annotated[ServerTool, Tag("other tool")],
    by_kind("tool", "custom", missing="custom"),
]


class MessageToolChoice(Strict):
    """Whether tools are used: as the model decides (`auto`), at least one (`any`), this one (`tool`), none."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _only_one_tool_has_a_name(self) -> MessageToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("tool_choice has a name if its type is tool, and only then")
        return self


class Thinking(Strict):
    """Whether the model reasons before it answers.

    `enabled` and `adaptive` switch it on, `disabled` off, in chat templates that have a switch; without this field the
    template's default holds. `budget_tokens` is a target for models that know one and limits nothing here: `max_tokens`
    bounds the reasoning and the answer together. With `display: omitted`, thinking blocks are sent without their text.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _enabled_has_a_budget(self) -> Thinking:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise ValueError("thinking has budget_tokens if its type is enabled, and only then")
        return self


class JSONOutput(Strict):
    """The answer is JSON that fits a JSON schema."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JSONOutput | None = None


class AllTurns(Strict):
    type: Literal["all"]


class KeepThinking(Strict):
    """Keeps all thinking blocks in the context, as without it."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"] | AllTurns


class ContextManagement(Strict):
    edits: Annotated[list[KeepThinking], Field(max_length=1, fail_fast=True)] | None = None


class MessageMetadata(Strict):
    user_id: Annotated[str, Field(max_length=1000)] | None = None


class MessagesPrompt(ModelSelection):
    """What both routes take. None means the default."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=10_000, fail_fast=True)]
    system: Text | TextBlocks | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JSONOutput | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    metadata: MessageMetadata | None = None

    cache_control: CacheControl | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard"] | None = None
    inference_geo: None = None
    context_management: ContextManagement | None = None
    container: None = None
    mcp_servers: Nothing = None
    diagnostics: None = None
    thread: dict[str, Any] | None = None  # refused in a way that makes the SDK go on without


class CreateMessage(MessagesPrompt):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]


class CountMessageTokens(MessagesPrompt):
    """Body of `POST /v1/messages/count_tokens`: that of a message; what does not change the prompt has no effect."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None


class MessageUsage(Strict):
    """Tokens of a message; the prompt has `input_tokens` and those read from the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageReply(Strict):
    """A generated message. `adapter` is `name@digest`, or several; it is left out for the base."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    adapter: str | list[str] | None = None
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageTokenCount(Strict):
    input_tokens: int


class ErrorDetails(Strict):
    """The error's code, and the parameter at fault, as this server's other routes name them."""

    error_code: str | None
    param: str | None


class ErrorDescription(Strict):
    type: str
    message: str
    details: ErrorDetails


class AnthropicError(Strict):
    type: Literal["error"]
    error: ErrorDescription
    request_id: str | None
