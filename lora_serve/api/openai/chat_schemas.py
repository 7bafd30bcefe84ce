"""Chat messages and tools as strict pydantic models: everything that OpenAI's SDK or this server produced is accepted.

Fields of a message that cannot change the prompt (annotations, a null refusal) are accepted and left out of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from lora_serve.api.openai.schemas import MOST_LOGPROBS, Generation, Strict, Text
from lora_serve.api.openai.tagged_unions import NeverValid, by_kind, kind_of

MOST_TOOLS = 128
MOST_TOOL_CALLS = 128  # in one message
NOT_TEXT = {
    "image_url": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
    "file": "file",
}

Name = Annotated[str, Field(max_length=200)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]  # OpenAI's limit is 64, Anthropic's 128
Identifier = Annotated[str, Field(max_length=200)]


class CacheControl(Strict):
    """A hint for prompt caching, which is automatic here."""

    type: Literal["ephemeral"]
    ttl: Annotated[str, Field(max_length=20)] | None = None
    scope: Annotated[str, Field(max_length=20)] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None

    @property
    def shown(self) -> str:
        return self.text


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text

    @property
    def shown(self) -> str:
        return self.refusal


class UnsupportedPart(NeverValid):
    """A content part that is not text."""

    @classmethod
    def refusal(cls, value: Any) -> str:
        what = NOT_TEXT.get(kind_of(value))
        return f"this server does not support {what} input" if what else "a content part must have type text or refusal"

    @property
    def shown(self) -> str:
        return ""


Part = Annotated[
    Annotated[TextPart, Tag("text part")]
    | Annotated[RefusalPart, Tag("refusal part")]
    | Annotated[UnsupportedPart, Tag("other part")],
    by_kind("part", "text", "refusal"),
]
Parts = Annotated[list[Part], Field(max_length=10_000, fail_fast=True)]


class FunctionCall(Strict):
    """A function and the JSON text of its arguments; `parsed_arguments` is what the SDK made of it."""

    name: FunctionName
    arguments: Text
    parsed_arguments: Any = None


class ToolCall(Strict):
    """A call of a function that an assistant message made."""

    id: Identifier
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # of a streamed delta


class Message(Strict):
    """One message of a conversation, as sent by a client or as a response contained it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Parts | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOL_CALLS, fail_fast=True)] | None = None
    tool_call_id: Identifier | None = None
    function_call: FunctionCall | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None
    parsed: Any = None  # what the SDK made of the content
    audio: None = None

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> Message:
        if self.role != "assistant" and self.content is None:
            raise ValueError("content is missing; only an assistant message may be without")
        if self.role != "assistant" and (self.tool_calls or self.function_call):
            raise ValueError("only an assistant message has tool calls")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs the tool_call_id that it answers")
        return self

    @property
    def text(self) -> str:
        """The text of all content parts; of an assistant that refused, its refusal."""
        if isinstance(self.content, list):
            return "".join(part.shown for part in self.content)
        return self.content or self.refusal or ""

    def for_template(self) -> dict[str, Any]:
        """The message as a dict, of what can change the prompt."""
        shown = self.model_dump(include={"role", "name", "tool_call_id"}, exclude_none=True) | {"content": self.text}
        if self.role == "function":  # what `tool` was called before functions had ids
            shown["role"] = "tool"
        if reasoning := self.reasoning_content or self.reasoning:
            shown["reasoning_content"] = reasoning
        calls = [
            call.model_dump(exclude={"index": True, "function": {"parsed_arguments"}}) for call in self.tool_calls or []
        ]
        if self.function_call:
            calls.append(
                {"id": "", "type": "function", "function": self.function_call.model_dump(exclude={"parsed_arguments"})}
            )
        return shown | ({"tool_calls": calls} if calls else {})


Messages = Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]


class Function(Strict):
    """A function that the model may call. `parameters` is a JSON schema; None takes no arguments."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function
    cache_control: CacheControl | None = None


class NamedFunction(Strict):
    name: FunctionName


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class TemplateArguments(Strict):
    """Chat template arguments that callers may set."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    preserve_thinking: bool | None = None
    add_vision_id: bool | None = None
    date_string: Annotated[str, Field(max_length=100)] | None = None


class ChatCompletion(Generation):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    prediction: None = None
    audio: None = None
    web_search_options: None = None
    verbosity: Literal["medium"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    echo: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    chat_template: None = None
    documents: None = None
