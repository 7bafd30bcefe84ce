"""Request bodies of Tinker's API. What would change a result and is not served is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_serve.api.error_handlers import validation_error
from lora_serve.api.json_body import decode
from lora_serve.errors import BadRequest

LONGEST_TEXT = 1000  # characters of a name, a path or an id
MOST_SAMPLES = 1024  # of one request
MOST_STOPS = 64
MOST_ALTERNATIVES = 20

Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Count = Annotated[int, Field(ge=0)]
Element = TypeVar("Element")
Stops = Annotated[list[Element], Field(max_length=MOST_STOPS)]
Body = TypeVar("Body", bound="TinkerBody")


class TinkerBody(BaseModel):
    """Base of the bodies."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TolerantBody(BaseModel):
    """Base of bodies whose other fields have no effect on results."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class SessionBody(TolerantBody):
    """Begin a session."""

    tags: list[Text] = Field([], max_length=1000)
    user_metadata: dict[str, Any] | None = None
    sdk_version: Text = ""


class HeartbeatBody(TolerantBody):
    """The client is there."""

    session_id: Text


class LoraBody(TinkerBody):
    """The adapter of a new model."""

    rank: int = Field(32, ge=1)
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerBody(TolerantBody):
    """The optimizer of a new model."""

    type: Text = "adamw"


class CreateModelBody(TinkerBody):
    """Make a model."""

    session_id: Text
    model_seq_id: Count
    base_model: Text
    lora_config: LoraBody = LoraBody()
    optimizer_config: OptimizerBody = OptimizerBody()
    user_metadata: dict[str, Any] | None = None
    type: Literal["create_model"] = "create_model"


class LoadWeightsBody(TinkerBody):
    """Make a model from a checkpoint, or load one into a model."""

    path: Text
    optimizer: bool
    session_id: Text | None = None
    model_seq_id: Count | None = None
    base_model: Text | None = None
    model_id: Text | None = None
    seq_id: Count | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerBody = OptimizerBody()
    weights_access_token: str | None = None
    type: Literal["load_weights"] = "load_weights"


class ModelBody(TolerantBody):
    """Ask for a model."""

    model_id: Text


class AdamBody(TinkerBody):
    """AdamW's numbers, with the client's defaults; `grad_clip_norm` 0 is no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStepBody(TinkerBody):
    """Apply the gradients."""

    model_id: Text
    seq_id: Count | None = None
    adam_params: AdamBody
    type: Literal["optim_step"] = "optim_step"


class SaveWeightsBody(TinkerBody):
    """Save weights and optimizer."""

    model_id: Text
    seq_id: Count | None = None
    path: Text | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights"] = "save_weights"


class SaveSamplerBody(TinkerBody):
    """Save weights for sampling: by name, or for a sampling session alone."""

    model_id: Text
    seq_id: Count | None = None
    path: Text | None = None
    sampling_session_seq_id: Count | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SamplingSessionBody(TinkerBody):
    """Begin to sample from a base or a checkpoint."""

    session_id: Text
    sampling_session_seq_id: Count
    base_model: Text | None = None
    model_path: Text | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class TextChunk(TinkerBody):
    """Tokens of a prompt."""

    type: Literal["encoded_text"]
    tokens: Annotated[list[Count], Field(fail_fast=True)]


class PromptBody(TinkerBody):
    """A prompt."""

    chunks: Annotated[list[TextChunk], Field(fail_fast=True)]


class SamplingParamsBody(TinkerBody):
    """How to sample."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: Text | Stops[Text] | Stops[Count] | None = None
    temperature: float = Field(1.0, ge=0)
    top_k: int = -1
    top_p: float = Field(1.0, gt=0, le=1)


class SampleBody(TinkerBody):
    """Sample from a sampling session."""

    prompt: PromptBody
    sampling_session_id: Text
    seq_id: Count
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    num_samples: int = Field(1, ge=1, le=MOST_SAMPLES)
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(0, ge=0, le=MOST_ALTERNATIVES)
    topk_sample_logprobs: int = Field(0, ge=0, le=MOST_ALTERNATIVES)
    prompt_alt_tokens_k: Literal[0] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    target_prompt_logprobs: None = None
    record_stability_info: bool | None = None
    base_model: None = None
    model_path: None = None
    type: Literal["sample"] = "sample"


class FutureBody(TolerantBody):
    """Ask for a result."""

    request_id: Text


class PathBody(TolerantBody):
    """A checkpoint's path."""

    tinker_path: Text


class TtlBody(TolerantBody):
    """When a checkpoint expires; null is never."""

    ttl_seconds: int | None = None


def read_body(kind: type[Body], body: bytes) -> Body:
    """A body of a call, validated when its turn comes. Raises `BadRequest` that names the field at fault."""
    sent = decode(body)
    try:
        return kind.model_validate(sent)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        invalid: BadRequest = validation_error(problems, sent)
    raise invalid
