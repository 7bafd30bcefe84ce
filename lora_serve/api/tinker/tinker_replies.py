"""Responses of Tinker's API, and the OpenAPI schemas of bodies that FastAPI does not read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lora_serve.api.openapi import Responses, errors


class TinkerReply(BaseModel):
    """Base of the responses."""

    model_config = ConfigDict(protected_namespaces=())


class ClientFlags(TinkerReply):
    """How clients are to behave."""

    parallel_fwdbwd_chunks: bool = False  # a piece after another: they are carried out in this order anyway
    fwdbwd_max_chunk_bytes_count: int
    sample_max_concurrent_requests: int


class DynamicFlags(TinkerReply):
    """What clients ask for again from time to time."""

    refresh_interval_sec: int = 3600
    sample_cancel_enabled: bool = True
    sample_cancel_max_batch_size: int = 64


class SessionReply(TinkerReply):
    """A new session."""

    session_id: str
    info_message: str | None
    type: Literal["create_session"] = "create_session"


class HeartbeatReply(TinkerReply):
    """A heartbeat was taken."""

    type: Literal["session_heartbeat"] = "session_heartbeat"


class Accepted(TinkerReply):
    """Something was taken, and there is nothing to be said of it."""

    status: Literal["accepted"] = "accepted"


class HealthReply(TinkerReply):
    """The server answers."""

    status: Literal["ok"] = "ok"


class FutureReply(TinkerReply):
    """A request was accepted; its result is asked for by its id."""

    request_id: str
    model_id: str | None = None


class SampleReply(FutureReply):
    """The same for samples; each has an id of its own."""

    sample_sequence_ids: list[str]


class ModelData(TinkerReply):
    """What a model is made of."""

    arch: str
    model_name: str
    tokenizer_id: str


class ModelReply(TinkerReply):
    """A model."""

    model_id: str
    model_name: str
    model_data: ModelData
    is_lora: Literal[True] = True
    lora_rank: int
    type: Literal["get_info"] = "get_info"


class SamplingSessionReply(TinkerReply):
    """A sampling session."""

    sampling_session_id: str
    type: Literal["create_sampling_session"] = "create_sampling_session"


class SamplerReply(TinkerReply):
    """What a sampling session samples from."""

    sampler_id: str
    base_model: str
    model_path: str | None


class SupportedModel(TinkerReply):
    """A base."""

    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool


class Capabilities(TinkerReply):
    """The bases that are served."""

    supported_models: list[SupportedModel]


class CheckpointReply(TinkerReply):
    """A checkpoint."""

    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler"]
    time: str
    tinker_path: str
    size_bytes: int
    public: Literal[False] = False
    user_metadata: dict[str, str] | None
    expires_at: str | None


class CursorReply(TinkerReply):
    """Which part of a list this is."""

    offset: int
    limit: int
    total_count: int


class CheckpointListReply(TinkerReply):
    """Checkpoints, newest first; a model's own without a cursor."""

    checkpoints: list[CheckpointReply]
    cursor: CursorReply | None = None


class TrainingRunReply(TinkerReply):
    """A model that is trained, or has checkpoints."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: Literal[True] = True
    lora_rank: int
    corrupted: Literal[False] = False
    last_request_time: str
    last_checkpoint: CheckpointReply | None
    last_sampler_checkpoint: CheckpointReply | None
    user_metadata: dict[str, str] | None


class TrainingRunListReply(TinkerReply):
    """Models, the one asked for last first."""

    training_runs: list[TrainingRunReply]
    cursor: CursorReply


class WeightsReply(TinkerReply):
    """What a model that loads a checkpoint has to be."""

    base_model: str
    is_lora: Literal[True] = True
    lora_rank: int
    train_unembed: bool | None
    train_mlp: bool | None
    train_attn: bool | None


class SessionListReply(TinkerReply):
    """Ids of sessions."""

    sessions: list[str]


class SessionDescription(TinkerReply):
    """What a session has."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None


def json_body(*kinds: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's words on a JSON body of one of these kinds, which a route reads itself."""
    schemas = [_inlined(kind.model_json_schema()) for kind in kinds]
    return _body("application/json", schemas[0] if len(schemas) == 1 else {"anyOf": schemas})


def protobuf_body() -> dict[str, Any]:
    """OpenAPI's words on a protobuf body."""
    return _body("application/x-protobuf", {"type": "string", "format": "binary"})


def result_responses() -> Responses:
    """OpenAPI's words on a result, which may be of any request, and on one that is not there yet."""
    content = {
        "application/json": {"schema": {"type": "object"}},
        "application/x-protobuf": {"schema": {"type": "string", "format": "binary"}},
    }
    return {200: {"description": "The result", "content": content}, **errors(404, 408, 410)}


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references."""
    parts = schema.pop("$defs", {})

    def whole(node: Any) -> Any:
        if isinstance(node, list):
            return [whole(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return whole(parts[node["$ref"].rpartition("/")[2]])
        return {key: whole(value) for key, value in node.items()}

    found: dict[str, Any] = whole(schema)
    return found
