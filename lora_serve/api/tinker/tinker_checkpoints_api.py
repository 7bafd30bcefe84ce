"""`/api/v1`, Tinker's API: lists of training runs, checkpoints and sessions, and what is done with checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi import Path as InPath

from lora_serve.api.auth import Administrator, Authorized
from lora_serve.api.caller import Caller
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openapi import errors
from lora_serve.api.tinker.checkpoint_store import (
    LONGEST_TTL,
    SAMPLER,
    SCHEME,
    SHORTEST_TTL,
    TRAINING,
    ModelFacts,
    TinkerCheckpoint,
)
from lora_serve.api.tinker.tinker_bodies import PathBody, TtlBody
from lora_serve.api.tinker.tinker_errors import UnknownTinkerObject
from lora_serve.api.tinker.tinker_replies import (
    Accepted,
    CheckpointListReply,
    CheckpointReply,
    CursorReply,
    SessionDescription,
    SessionListReply,
    TrainingRunListReply,
    TrainingRunReply,
    WeightsReply,
)
from lora_serve.api.tinker.tinker_service import TinkerDep, TinkerService
from lora_serve.errors import BadRequest

router = APIRouter(prefix="/api/v1", tags=["tinker"], route_class=JSONRoute)

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0)]
RunId = Annotated[str, InPath(max_length=200)]
Kind = Literal["weights", "sampler_weights"]
Name = Annotated[str, InPath(max_length=200)]


@router.post("/weights_info", responses=errors(404))
async def weights_info(body: PathBody, tinker: TinkerDep, caller: Authorized) -> WeightsReply:
    """What a model that loads a checkpoint has to be."""
    model = (await _find(tinker, body.tinker_path, caller)).model
    return WeightsReply(
        base_model=model.base_model,
        lora_rank=model.settings.r,
        train_unembed=model.layers.get("train_unembed"),
        train_mlp=model.layers.get("train_mlp"),
        train_attn=model.layers.get("train_attn"),
    )


@router.get("/training_runs")
async def list_training_runs(
    tinker: TinkerDep, caller: Authorized, limit: Limit = 100, offset: Offset = 0
) -> TrainingRunListReply:
    """This key's models that are trained or have checkpoints, the one asked for last first."""
    runs = await _runs(tinker, caller)
    cursor = CursorReply(offset=offset, limit=limit, total_count=len(runs))
    return TrainingRunListReply(training_runs=runs[offset : offset + limit], cursor=cursor)


@router.get("/training_runs/{training_run_id}", responses=errors(404))
async def describe_training_run(training_run_id: RunId, tinker: TinkerDep, caller: Authorized) -> TrainingRunReply:
    """One model."""
    found = [run for run in await _runs(tinker, caller) if run.training_run_id == training_run_id]
    if not found:
        raise UnknownTinkerObject(f"there is no training run {training_run_id}", param="training_run_id")
    return found[0]


@router.get("/training_runs/{training_run_id}/checkpoints")
async def list_run_checkpoints(training_run_id: RunId, tinker: TinkerDep, caller: Authorized) -> CheckpointListReply:
    """A model's checkpoints, newest first."""
    found = [each for each in await _checkpoints(tinker, caller) if each.model_id == training_run_id]
    return CheckpointListReply(checkpoints=[_shown(each) for each in found])


@router.get("/checkpoints")
async def list_checkpoints(
    tinker: TinkerDep, caller: Authorized, limit: Limit = 100, offset: Offset = 0
) -> CheckpointListReply:
    """This key's checkpoints, newest first."""
    found = await _checkpoints(tinker, caller)
    cursor = CursorReply(offset=offset, limit=limit, total_count=len(found))
    return CheckpointListReply(checkpoints=[_shown(each) for each in found[offset : offset + limit]], cursor=cursor)


@router.delete("/training_runs/{training_run_id}/checkpoints/{kind}/{name}", responses=errors(404))
async def delete_checkpoint(
    training_run_id: RunId, kind: Kind, name: Name, tinker: TinkerDep, caller: Administrator
) -> Accepted:
    """Delete a checkpoint."""
    checkpoint = await _find(tinker, f"{SCHEME}{training_run_id}/{kind}/{name}", caller)
    await asyncio.to_thread(tinker.checkpoints.delete, checkpoint)
    await tinker.weights.delete(checkpoint.adapter)
    return Accepted()


@router.put("/training_runs/{training_run_id}/checkpoints/{kind}/{name}/ttl", responses=errors(404, 507))
async def set_checkpoint_ttl(
    training_run_id: RunId, kind: Kind, name: Name, body: TtlBody, tinker: TinkerDep, caller: Administrator
) -> Accepted:
    """Let a checkpoint expire so many seconds from now, or never."""
    if body.ttl_seconds is not None and not SHORTEST_TTL <= body.ttl_seconds <= LONGEST_TTL:
        raise BadRequest(f"ttl_seconds is {SHORTEST_TTL} to {LONGEST_TTL}", param="ttl_seconds")
    checkpoint = await _find(tinker, f"{SCHEME}{training_run_id}/{kind}/{name}", caller)
    await asyncio.to_thread(tinker.checkpoints.set_expiry, checkpoint, body.ttl_seconds)
    return Accepted()


@router.get("/sessions")
async def list_sessions(
    tinker: TinkerDep, caller: Authorized, limit: Limit = 100, offset: Offset = 0
) -> SessionListReply:
    """This key's sessions."""
    return SessionListReply(sessions=[each.id for each in tinker.sessions(caller.owner)[offset : offset + limit]])


@router.get("/sessions/{session_id}", responses=errors(404))
async def describe_session(
    session_id: Annotated[str, InPath(max_length=100)], tinker: TinkerDep, caller: Authorized
) -> SessionDescription:
    """What a session has."""
    session = await tinker.session(session_id, caller.owner)
    return SessionDescription(
        training_run_ids=[model.id for model in session.models],
        sampler_ids=[sampler.id for sampler in session.samplers],
        user_metadata={name: str(value) for name, value in session.record.metadata.items()},
    )


async def _checkpoints(tinker: TinkerService, caller: Caller) -> list[TinkerCheckpoint]:
    return list(reversed(await asyncio.to_thread(tinker.checkpoints.list, caller.owner)))


async def _find(tinker: TinkerService, path: str, caller: Caller) -> TinkerCheckpoint:
    return await asyncio.to_thread(tinker.checkpoints.find, path, caller.owner)


async def _runs(tinker: TinkerService, caller: Caller) -> list[TrainingRunReply]:
    facts: dict[str, ModelFacts] = {}
    times: dict[str, float] = {}
    saved: dict[str, list[TinkerCheckpoint]] = {}
    for session in tinker.sessions(caller.owner):
        for model in session.models:
            if model.facts is not None:
                facts[model.id], times[model.id] = model.facts, model.last_request
    for checkpoint in await _checkpoints(tinker, caller):
        saved.setdefault(checkpoint.model_id, []).append(checkpoint)
        facts.setdefault(checkpoint.model_id, checkpoint.model)
        times.setdefault(checkpoint.model_id, checkpoint.created)
    return [
        _run(id_, facts[id_], times[id_], saved.get(id_, []), caller)
        for id_ in sorted(times, key=lambda id_: times[id_], reverse=True)
    ]


def _run(
    id_: str, facts: ModelFacts, last: float, saved: Sequence[TinkerCheckpoint], caller: Caller
) -> TrainingRunReply:
    def newest(kind: str) -> CheckpointReply | None:
        return next((_shown(each) for each in saved if each.kind == kind), None)

    return TrainingRunReply(
        training_run_id=id_,
        base_model=facts.base_model,
        model_owner=caller.name,
        lora_rank=facts.settings.r,
        last_request_time=_time(last),
        last_checkpoint=newest(TRAINING),
        last_sampler_checkpoint=newest(SAMPLER),
        user_metadata=facts.metadata or None,
    )


def _shown(checkpoint: TinkerCheckpoint) -> CheckpointReply:
    return CheckpointReply(
        checkpoint_id=f"{checkpoint.kind}/{checkpoint.name}",
        checkpoint_type="training" if checkpoint.kind == TRAINING else "sampler",
        time=_time(checkpoint.created),
        tinker_path=checkpoint.path,
        size_bytes=checkpoint.size,
        user_metadata=checkpoint.metadata or None,
        expires_at=None if checkpoint.expires is None else _time(checkpoint.expires),
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
