"""Request bodies as strict pydantic models: unknown fields are refused by name, and types are not coerced.

Fields that OpenAI clients send by default are accepted with the values that have no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lora_serve.request import MOST_ADAPTERS

MOST_STOPS = 4
LONGEST_STOP = 256  # characters
MOST_BIASES = 1024
MOST_LOGPROBS = 20
MOST_PROMPTS = 2048
MOST_CHOICES = 10_000
LONGEST_CHOICE = 10_000  # characters

Text = Annotated[str, Field(max_length=4_000_000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=4_000_000)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class WeightedAdapter(Strict):
    """An adapter with a factor on its delta."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    weight: Annotated[float, Field(ge=-100, le=100)] = 1.0


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    """A named JSON Schema. `strict`: refuse schemas outside of OpenAI's strict subset."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    description: Annotated[str, Field(max_length=10_000)] | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
Choices = Annotated[
    list[Annotated[str, Field(max_length=LONGEST_CHOICE)]], Field(min_length=1, max_length=MOST_CHOICES)
]


class StructuredOutputs(Strict):
    """What the output must match, in vLLM's form; exactly one of the first six.

    `json_`: a JSON Schema, or its text. `grammar`: in Lark's syntax. Whitespace options apply to JSON.
    """

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: Annotated[str, Field(max_length=LONGEST_STOP)] | None = None
    disable_any_whitespace: bool | None = None

    def requested(self, kind: str) -> Any:
        return self.json_ if kind == "json" else getattr(self, kind)


class Generation(Strict):
    """Common fields of completions and chat completions. None means the default."""

    model: Annotated[str, Field(max_length=400)] | None = None
    adapter: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | WeightedAdapter
        | Annotated[list[WeightedAdapter], Field(min_length=1, max_length=MOST_ADAPTERS)]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MOST_BIASES)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MOST_BIASES),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: Annotated[str, Field(max_length=LONGEST_STOP)] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Completion(Generation):
    """Body of `POST /v1/completions`."""

    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(max_length=MOST_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    add_special_tokens: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _something_to_complete(cls, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError("the prompt is empty")
        return value


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None
    name: Annotated[str, Field(max_length=200)] | None = None


class TemplateArguments(Strict):
    """Chat template arguments that callers may set."""

    enable_thinking: bool | None = None
    add_vision_id: bool | None = None


class ChatCompletion(Generation):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fields_that_need_each_other(self) -> ChatCompletion:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self


class Tokenize(Strict):
    """Body of `POST /tokenize`: a prompt, or messages for the chat template."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Tokenize:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class Detokenize(Strict):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds
