"""Body of `POST /v1/responses` as strict pydantic models: whatever OpenAI's SDK or this server produced is accepted.

Fields that mean nothing here are accepted and have no effect; what would change the answer and is not served is refused
with the reason. Nothing is stored, so `store` is accepted at every value, and references to stored things are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from lora_serve.api.openai.chat_schemas import MOST_TOOLS, FunctionName, Identifier
from lora_serve.api.openai.schemas import MOST_LOGPROBS, AdapterChoice, Strict, Text

LONGEST_KIND = 50  # characters of a type in a message
MOST_PARTS = 10_000
NOTHING_STORED = "this server stores no responses; send the whole conversation as input"
NOT_TEXT = {"input_image": "image", "input_file": "file", "input_audio": "audio"}
LOGPROBS = "message.output_text.logprobs"

Status = Literal["in_progress", "completed", "incomplete"]


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else "message" if kind is None else "unknown"


def _tag(what: str, *supported: str) -> Discriminator:
    """Chooses the union's member by `type`. Tags are not names of fields, which errors would mistake them for."""
    return Discriminator(lambda value: f"{kind} {what}" if (kind := _kind(value)) in supported else f"other {what}")


def _refused(reason: str, *accepted: Any) -> BeforeValidator:
    """Gives the reason for any value but null and those accepted."""

    def check(value: Any) -> Any:
        if value is None or value in accepted:
            return value
        raise ValueError(reason)

    return BeforeValidator(check)


# --- input -----------------------------------------------------------------------------------------------------------


class InputTextPart(Strict):
    type: Literal["input_text"]
    text: Text

    @property
    def shown(self) -> str:
        return self.text


class OutputTextPart(Strict):
    """Text of a recorded answer."""

    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None  # added by the SDK

    @property
    def shown(self) -> str:
        return self.text


class OutputRefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text

    @property
    def shown(self) -> str:
        return self.refusal


class UnsupportedInputPart(Strict):
    """A content part that is not text; its validation always fails, with the reason."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        what = NOT_TEXT.get(_kind(value))
        raise ValueError(
            f"this server does not support {what} input"
            if what
            else "a content part must have type input_text, output_text or refusal"
        )

    @property
    def shown(self) -> str:
        return ""


InputPart = Annotated[
    Annotated[InputTextPart, Tag("input_text part")]
    | Annotated[OutputTextPart, Tag("output_text part")]
    | Annotated[OutputRefusalPart, Tag("refusal part")]
    | Annotated[UnsupportedInputPart, Tag("other part")],
    _tag("part", "input_text", "output_text", "refusal"),
]
Content = Text | Annotated[list[InputPart], Field(max_length=MOST_PARTS, fail_fast=True)]


class MessageItem(Strict):
    """A message, as written by a client or as a response contained it."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Identifier | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Strict):
    """A function call that the model made. `arguments` is JSON text."""

    type: Literal["function_call"]
    call_id: Identifier
    name: FunctionName
    arguments: Text
    id: Identifier | None = None
    status: Status | None = None
    namespace: None = None
    parsed_arguments: Any = None  # added by the SDK


class FunctionCallOutputItem(Strict):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: Identifier
    output: Content
    id: Identifier | None = None
    status: Status | None = None


class SummaryText(Strict):
    type: Literal["summary_text"]
    text: Text


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Strict):
    """The model's reasoning; that of others, which is encrypted, is left out of the prompt."""

    type: Literal["reasoning"]
    id: Identifier | None = None
    summary: Annotated[list[SummaryText], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    encrypted_content: Text | None = None
    status: Status | None = None


class UnsupportedItem(Strict):
    """An item that is not served; its validation always fails, with the reason."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = _kind(value)
        if kind == "item_reference":
            raise ValueError(
                "this server stores no items to refer to; send the item itself (clients do at store: false)"
            )
        raise ValueError(f"this server does not support items of type {kind[:LONGEST_KIND]}")


InputItem = Annotated[
    Annotated[MessageItem, Tag("message item")]
    | Annotated[FunctionCallItem, Tag("function_call item")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output item")]
    | Annotated[ReasoningItem, Tag("reasoning item")]
    | Annotated[UnsupportedItem, Tag("other item")],
    _tag("item", "message", "function_call", "function_call_output", "reasoning"),
]
InputItems = Annotated[list[InputItem], Field(min_length=1, max_length=10_000, fail_fast=True)]


# --- tools and formats -----------------------------------------------------------------------------------------------


class ResponseFunction(Strict):
    """A function that the model may call. `parameters` is a JSON schema; None takes no arguments."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class HostedTool(Strict):
    """A tool that OpenAI's servers run; its validation always fails, with the reason."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = _kind(value)[:LONGEST_KIND] if isinstance(value, dict) and "type" in value else "without a type"
        raise ValueError(f"this server does not support the tool {kind}; it supports tools of type function")


ResponseTool = Annotated[
    Annotated[ResponseFunction, Tag("function tool")] | Annotated[HostedTool, Tag("other tool")],
    _tag("tool", "function"),
]


class NamedFunctionChoice(Strict):
    """The function that the model must call."""

    type: Literal["function"]
    name: FunctionName


class PlainTextFormat(Strict):
    type: Literal["text"]


class JsonObjectText(Strict):
    type: Literal["json_object"]


class JsonSchemaText(Strict):
    """A named JSON schema that the text must fit. `strict`: refuse schemas outside of OpenAI's strict subset."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    description: Annotated[str, Field(max_length=10_000)] | None = None


class TextConfig(Strict):
    format: Annotated[PlainTextFormat | JsonObjectText | JsonSchemaText, Field(discriminator="type")] | None = None
    verbosity: Annotated[Literal["medium"] | None, _refused("the base model knows no verbosity", "medium")] = None


class ReasoningConfig(Strict):
    """How much the model reasons. Its reasoning is returned as it is, so summaries of it are empty."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Annotated[Literal[False] | None, _refused("this server does not pad events", False)] = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class CreateResponse(Strict):
    """Body of `POST /v1/responses`. None means the default."""

    model: Annotated[str, Field(max_length=400)] | None = None
    adapter: AdapterChoice | None = None
    input: Text | InputItems
    instructions: Text | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    include: Annotated[list[Includable], Field(max_length=100)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None

    store: bool | None = None  # nothing is stored
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None  # of tools that a server runs: there are none
    truncation: Annotated[
        Literal["disabled"] | None, _refused("this server leaves nothing out of a long conversation", "disabled")
    ] = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1000)] | None = None  # prompts are always cached
    prompt_cache_retention: Annotated[str, Field(max_length=100)] | None = None
    background: Annotated[Literal[False] | None, _refused("this server runs no responses in the background", False)] = (
        None
    )
    previous_response_id: Annotated[None, _refused(NOTHING_STORED)] = None
    conversation: Annotated[None, _refused(NOTHING_STORED)] = None
    prompt: Annotated[None, _refused("this server stores no prompts; send it as instructions and input")] = None

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities are wanted."""
        return LOGPROBS in (self.include or ())
