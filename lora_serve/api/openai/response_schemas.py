"""Body of `POST /v1/responses` as strict pydantic models.

Fields that mean nothing here are accepted and have no effect; what would change the answer and is not served is refused
with the reason. Responses are not stored, whatever `store` says, and references to stored ones are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from lora_serve.api.openai.chat_schemas import MOST_TOOLS, FunctionName
from lora_serve.api.openai.response_input import InputItems
from lora_serve.api.openai.schemas import MOST_LOGPROBS, Few, ModelSelection, Strict, Text
from lora_serve.api.openai.tagged_unions import LONGEST_KIND, NeverValid, by_kind, kind_of

NOTHING_STORED = "this server stores no responses; send the whole conversation as input"
LOGPROBS = "message.output_text.logprobs"


def _refused(reason: str, *accepted: Any) -> BeforeValidator:
    """Refuse any value but null and those accepted, with the reason."""

    def check(value: Any) -> Any:
        if value is None or value in accepted:
            return value
        raise ValueError(reason)

    return BeforeValidator(check)


class ResponseFunction(Strict):
    """A function that the model may call. `parameters` is a JSON schema; None takes no arguments."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class HostedTool(NeverValid):
    """A tool that OpenAI's servers run."""

    @classmethod
    def refusal(cls, value: Any) -> str:
        kind = kind_of(value)[:LONGEST_KIND] if isinstance(value, dict) and "type" in value else "without a type"
        return f"this server does not support the tool {kind}; it supports tools of type function"


ResponseTool = Annotated[
    Annotated[ResponseFunction, Tag("function tool")] | Annotated[HostedTool, Tag("other tool")],
    by_kind("tool", "function"),
]


class NamedFunctionChoice(Strict):
    """The function that the model must call."""

    type: Literal["function"]
    name: FunctionName


class AllowedFunctions(Strict):
    """The functions that the model may call, of those in `tools`."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunctionChoice], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)]


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

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
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


class CreateResponse(ModelSelection):
    """Body of `POST /v1/responses`. None means the default."""

    input: Text | InputItems
    instructions: Text | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedFunctionChoice | AllowedFunctions, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    include: Annotated[list[Includable], Field(max_length=100, fail_fast=True)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Few, Field(max_length=16)] | None = None

    store: bool | None = None  # false: keep no output items in memory either
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
