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


class ResponseFormat(Strict):
    type: Literal["text"]


class NoEffect(Strict):
    """Fields that clients send by default, accepted at the values at which they mean nothing here."""

    store: Literal[False] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
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
    priority: Literal[0] | None = None


class Generation(NoEffect):
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
            Field(max_length=MOST_BIASES),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
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
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _something_to_complete(cls, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError("the prompt is empty")
        return value
