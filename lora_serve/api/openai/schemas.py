"""Request bodies as strict pydantic models: unknown fields are refused by name, and types are not coerced.

Fields that OpenAI clients send by default are accepted with the values that have no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from lora_serve.request import MOST_ADAPTERS

MOST_STOPS = 4
MOST_STOP_TOKENS = 1024
LONGEST_STOP = 256  # characters
MOST_PRIORITY = 8
MOST_KEYS = 1024  # of an object
MOST_LOGPROBS = 20
MOST_PROMPTS = 2048
MOST_CHOICES = 10_000
LONGEST_CHOICE = 10_000  # characters

Text = str  # as long as the body may be; prompts are checked against the context
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Texts = Annotated[list[Text], Field(max_length=MOST_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(max_length=MOST_PROMPTS, fail_fast=True)]


def _prompt_kind(value: Any) -> str:
    """Which alternative of `Prompts` a value is meant to be, by its first item."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else 0
    return "texts" if isinstance(first, str) else "token lists" if isinstance(first, list) else "token ids"


Prompts = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[TokenIds, Tag("token ids")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[TokenLists, Tag("token lists")],
    Discriminator(_prompt_kind),
]
# Among the requests of one key, as in vLLM: smaller is more urgent.
Priority = Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Strict(BaseModel):
    """Base of all bodies. Lists in them are `fail_fast` and dicts `Few`, so that few mistakes are ever collected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return _few(value)


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MOST_KEYS:
        raise ValueError(f"it has more than {MOST_KEYS} fields")
    return value


Few = BeforeValidator(_few)  # for a dict: checks its size before its items


class WeightedAdapter(Strict):
    """An adapter with a factor on its delta."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    weight: Annotated[float, Field(ge=-100, le=100)] = 1.0


AdapterChoice = (
    Annotated[str, Field(min_length=1, max_length=200)]
    | WeightedAdapter
    | Annotated[list[WeightedAdapter], Field(min_length=1, max_length=MOST_ADAPTERS, fail_fast=True)]
)


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
    list[Annotated[str, Field(max_length=LONGEST_CHOICE)]], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)
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


class NoEffect(Strict):
    """Fields that clients send by default, accepted at the values at which they mean nothing here."""

    store: Literal[False] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Few, Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1000)] | None = None  # prompts are always cached
    prompt_cache_retention: Annotated[str, Field(max_length=100)] | None = None
    use_beam_search: Literal[False] | None = None
    early_stopping: Literal[False] | None = None
    length_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    return_tokens_as_token_ids: Literal[False] | None = None
    return_token_ids: Literal[False] | None = None
    logits_processors: None = None
    truncate_prompt_tokens: None = None


class ModelSelection(Strict):
    """The base, or the adapters to run it with."""

    model: Annotated[str, Field(max_length=400)] | None = None
    adapter: AdapterChoice | None = None


class Generation(ModelSelection, NoEffect):
    """Common fields of completions and chat completions. None means the default."""

    priority: Priority | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MOST_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Few,
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

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _something_to_complete(cls, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError("the prompt is empty")
        return value


class EmbeddingBody(ModelSelection):
    """Body of `POST /v1/embeddings`."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    priority: Priority | None = None

    @field_validator("input")
    @classmethod
    def _something_to_embed(cls, value: Any) -> Any:
        if not value or (isinstance(value, list) and not isinstance(value[0], int) and not all(value)):
            raise ValueError("it is empty, or has an empty item")
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _something_is_left(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("it must be -1 (the context length) or at least 1")
        return value
