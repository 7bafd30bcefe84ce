"""`/api/v1`, Tinker's API: sampling sessions and samples."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as InPath

from lora_serve.api.auth import Authorized
from lora_serve.api.caller import Caller
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openapi import errors
from lora_serve.api.tinker.checkpoint_store import SAMPLER
from lora_serve.api.tinker.sampling_sessions import SamplingSession
from lora_serve.api.tinker.tinker_bodies import SampleBody, SamplingSessionBody
from lora_serve.api.tinker.tinker_replies import SampleReply, SamplerReply, SamplingSessionReply
from lora_serve.api.tinker.tinker_service import TinkerDep, TinkerService
from lora_serve.errors import BadRequest

router = APIRouter(prefix="/api/v1", tags=["tinker"], route_class=JSONRoute)


@router.post("/create_sampling_session", responses=errors(404, 429))
async def create_sampling_session(
    body: SamplingSessionBody, tinker: TinkerDep, caller: Authorized
) -> SamplingSessionReply:
    """Begin to sample from the base, or from weights that were saved for it."""
    session = await tinker.session(body.session_id, caller.owner)
    id_ = session.sampler_id(body.sampling_session_seq_id)
    sampler = session.samplers.get(id_) or session.add_sampler(await _sampler(id_, body, tinker, caller))
    return SamplingSessionReply(sampling_session_id=sampler.id)


@router.get("/samplers/{sampling_session_id}", responses=errors(404))
async def describe_sampler(
    sampling_session_id: Annotated[str, InPath(max_length=100)], tinker: TinkerDep, caller: Authorized
) -> SamplerReply:
    """What a sampling session samples from."""
    sampler = await tinker.sampler(sampling_session_id, caller.owner)
    return SamplerReply(sampler_id=sampler.id, base_model=sampler.base_model, model_path=sampler.path)


@router.post("/asample", responses=errors(404, 429))
async def sample(body: SampleBody, tinker: TinkerDep, caller: Authorized) -> SampleReply:
    """Sample; the result has log-probabilities of all generated tokens."""
    sampler = await tinker.sampler(body.sampling_session_id, caller.owner)
    id_ = f"{sampler.id}:{body.seq_id}"
    tinker.samples.accept(id_, body, sampler, caller)
    return SampleReply(request_id=id_, sample_sequence_ids=[f"{id_}:{index}" for index in range(body.num_samples)])


async def _sampler(id_: str, body: SamplingSessionBody, tinker: TinkerService, caller: Caller) -> SamplingSession:
    if body.model_path is None:
        if body.base_model is None:
            raise BadRequest("base_model or model_path is needed", param="base_model")
        return SamplingSession(id_, tinker.check_base_model(body.base_model))
    checkpoint = await asyncio.to_thread(tinker.checkpoints.find, body.model_path, caller.owner)
    if checkpoint.kind != SAMPLER:
        raise BadRequest(
            "these weights are to be trained; sample from what save_weights_for_sampler saved", param="model_path"
        )
    base = body.base_model or checkpoint.model.base_model
    return SamplingSession(id_, base, checkpoint.path, checkpoint.adapter, checkpoint.digest)
