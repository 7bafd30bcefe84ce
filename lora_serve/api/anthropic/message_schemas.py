"""Bodies and responses of `/v1/messages` as strict pydantic models: whatever Anthropic's SDK or this server produced.

Fields that mean nothing here (prompts are always cached, so `cache_control` has no effect) are accepted. Blocks, tools
and fields that would change the answer and are not served are refused with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from lora_serve.api.openai.chat_schemas import MOST_TOOLS, CacheControl, FunctionName, Identifier
from lora_serve.api.openai.schemas import MOST_STOPS, AdapterChoice, Stop, Strict, Text

NOT_TEXT = ("image", "document", "audio", "video")
LONGEST_KIND = 50  # characters of a type in a message

Nothing = Annotated[list[Any], Field(max_length=0)] | None


class TextBlock(Strict):
    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None
    citations: list[Any] | None = None  # of a recorded answer


class DirectCaller(Strict):
    """Who made a tool call: the model itself."""

    type: Literal["direct"]


class ToolUseBlock(Strict):
    """A call of a tool that the assistant made."""

    type: Literal["tool_use"]
    id: Identifier
    name: FunctionName
    input: dict[str, Any]
    caller: DirectCaller | None = None
    toolset_name: None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(Strict):
    """The assistant's reasoning. Signatures are empty here, and not checked."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


class RedactedThinkingBlock(Strict):
    """Encrypted reasoning of another server, which cannot be read here and is left out."""

    type: Literal["redacted_thinking"]
    data: Text


class UnsupportedBlock(Strict):
    """A content block that is not served; its validation always fails, with the reason."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = _kind(value)
        if kind in NOT_TEXT:
            raise ValueError(f"this server does not support {kind} input")
        raise ValueError(f"this server does not support content blocks of type {kind[:LONGEST_KIND]}")


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else "unknown"


def _tag(*supported: str) -> Discriminator:
    """Chooses the union's member by `type`. Tags are not names of fields, which errors would mistake them for."""
    return Discriminator(lambda value: f"{kind} block" if (kind := _kind(value)) in supported else "other block")


OtherBlock = Annotated[UnsupportedBlock, Tag("other block")]
TextBlocks = Annotated[
    list[Annotated[Annotated[TextBlock, Tag("text block")] | OtherBlock, _tag("text")]],
    Field(max_length=10_000, fail_fast=True),
]


class ToolResultBlock(Strict):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: Identifier
    content: Text | TextBlocks | None = None
    is_error: bool | None = None
    toolset_name: None = None
    cache_control: CacheControl | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("text block")]
    | Annotated[ToolUseBlock, Tag("tool_use block")]
    | Annotated[ToolResultBlock, Tag("tool_result block")]
    | Annotated[ThinkingBlock, Tag("thinking block")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking block")]
    | OtherBlock,
    _tag("text", "tool_use", "tool_result", "thinking", "redacted_thinking"),
]
BLOCKS_OF_ROLE: dict[str, tuple[type[Strict], ...]] = {
    "system": (TextBlock,),
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
}


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[Block], Field(max_length=10_000, fail_fast=True)]

    @model_validator(mode="after")
    def _blocks_fit_the_role(self) -> Turn:
        for block in self.content if isinstance(self.content, list) else ():
            if not isinstance(block, BLOCKS_OF_ROLE[self.role]):
                raise ValueError(f"a message of role {self.role} has no {block.type} blocks")
        return self


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


class ServerTool(Strict):
    """A tool that Anthropic's servers define or run; its validation always fails, with the reason."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = _kind(value)[:LONGEST_KIND]
        raise ValueError(f"this server has no tool of type {kind}; give a custom tool with a name and an input_schema")


def _tool_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "custom tool" if kind in (None, "custom") else "server tool"


AnyTool = Annotated[
    Annotated[CustomTool, Tag("custom tool")] | Annotated[ServerTool, Tag("server tool")], Discriminator(_tool_kind)
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


class KeepThinking(Strict):
    """Keeps all thinking blocks in the context, as without it."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Strict):
    edits: Annotated[list[KeepThinking], Field(max_length=1, fail_fast=True)] | None = None


class MessageMetadata(Strict):
    user_id: Annotated[str, Field(max_length=1000)] | None = None


class MessagesPrompt(Strict):
    """What both routes take. None means the default."""

    model: Annotated[str, Field(max_length=400)] | None = None
    adapter: AdapterChoice | None = None
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

    @property
    def output_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, if it must have one."""
        format = (self.output_config.format if self.output_config else None) or self.output_format
        return None if format is None else format.schema_


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
