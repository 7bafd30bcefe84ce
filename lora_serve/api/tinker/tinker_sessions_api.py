"""`/api/v1`, Tinker's API: client flags, sessions, capabilities, and the results of accepted requests."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from fastapi.responses import JSONResponse

from lora_serve.api.auth import Authorized
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.choices import requests_at_once
from lora_serve.api.openai.preprocess import engine_info
from lora_serve.api.openapi import errors
from lora_serve.api.services import ServicesDep
from lora_serve.api.sse import cancel_on_disconnect
from lora_serve.api.tinker.tinker_bodies import FutureBody, HeartbeatBody, SessionBody
from lora_serve.api.tinker.tinker_replies import (
    Accepted,
    Capabilities,
    ClientFlags,
    DynamicFlags,
    HealthReply,
    HeartbeatReply,
    SessionReply,
    SupportedModel,
    result_responses,
)
from lora_serve.api.tinker.tinker_service import TinkerDep

router = APIRouter(prefix="/api/v1", tags=["tinker"], route_class=JSONRoute)
unread = APIRouter(prefix="/api/v1", tags=["tinker"])  # routes that do not look at their body

POLL_SECONDS = 25.0  # that a client waits for a result in one request; it gives up after 45
POLL_STEP = 1.0
CHUNK_BYTES = 5_000_000  # of a piece of a training request, estimated by the client
INFO = "lora-serve: a session ends when its client was silent for 10 minutes; checkpoints stay."
SessionId = Annotated[str, InPath(max_length=100)]


@unread.post("/client/config")
async def client_config(services: ServicesDep, caller: Authorized) -> ClientFlags:
    """Flags that clients read first."""
    chunk = min(CHUNK_BYTES, services.config.max_body * 5 // 8)
    return ClientFlags(fwdbwd_max_chunk_bytes_count=chunk, sample_max_concurrent_requests=requests_at_once(services))


@unread.post("/client/dynamic_config")
async def client_dynamic_config(caller: Authorized) -> DynamicFlags:
    """Flags that clients read from time to time."""
    return DynamicFlags()


@unread.post("/telemetry")
async def telemetry(caller: Authorized) -> Accepted:
    """Take telemetry and throw it away unread: clients put their key into it."""
    return Accepted()


@router.post("/create_session", responses=errors(429, 507))
async def create_session(body: SessionBody, tinker: TinkerDep, caller: Authorized) -> SessionReply:
    """Begin a session."""
    session = await tinker.new_session(caller.owner, body.user_metadata)
    return SessionReply(session_id=session.id, info_message=INFO)


@router.post("/session_heartbeat", responses=errors(404))
async def session_heartbeat(body: HeartbeatBody, tinker: TinkerDep, caller: Authorized) -> HeartbeatReply:
    """Keep a session."""
    await tinker.session(body.session_id, caller.owner)
    return HeartbeatReply()


@unread.post("/sessions/{session_id}/finish", responses=errors(404))
async def finish_session(session_id: SessionId, tinker: TinkerDep, caller: Authorized) -> Accepted:
    """End a session: its models and weights that were saved for its sampling sessions alone; checkpoints stay."""
    await tinker.finish(session_id, caller.owner)
    return Accepted()


@router.get("/get_server_capabilities")
async def capabilities(services: ServicesDep, caller: Authorized) -> Capabilities:
    """What is served."""
    info = engine_info(services)
    base = SupportedModel(
        model_name=services.config.served_name(),
        max_context_length=info.max_model_len,
        trainable=info.training_memory > 0,
        sampleable=not info.headless,
    )
    return Capabilities(supported_models=[base])


@router.get("/healthz")
async def healthz(caller: Authorized) -> HealthReply:
    """The server answers."""
    return HealthReply()


@router.post("/retrieve_future", response_class=Response, responses=result_responses())
async def retrieve_future(
    body: FutureBody, request: Request, tinker: TinkerDep, services: ServicesDep, caller: Authorized
) -> Response:
    """The result of a request, as soon as it is there; 408 if that takes longer than this may wait."""

    async def poll() -> Response:
        waited = 0.0
        while waited < POLL_SECONDS:
            result = await tinker.result(body.request_id, caller.owner, POLL_STEP)
            if result is not None:
                return Response(result.body, media_type=result.media_type)
            waited += POLL_STEP
            if services.engine.alive and not services.engine.ready:
                break  # the server is about to end
        return JSONResponse(_not_yet(), 408)

    return await cancel_on_disconnect(request.receive, poll())


@router.post("/cancel_future", responses=errors(404))
async def cancel_future(body: FutureBody, tinker: TinkerDep, caller: Authorized) -> Accepted:
    """Abort a sample; other requests are carried out."""
    if tinker.futures.is_of(body.request_id, caller.owner):
        tinker.samples.cancel(body.request_id)
    return Accepted()


def _not_yet() -> dict[str, Any]:
    error = {"message": "the result is not there yet", "type": "not_ready", "param": None, "code": "not_ready"}
    return {"error": error, "queue_state": "active"}
