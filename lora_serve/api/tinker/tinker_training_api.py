"""`/api/v1`, Tinker's API: models. Every call is accepted and gets a result later, a wrong one an error as result."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from lora_serve.api.auth import Administrator
from lora_serve.api.error_handlers import UnsupportedMedia
from lora_serve.api.json_body import JSONRoute, decode
from lora_serve.api.openai.preprocess import engine_info
from lora_serve.api.openapi import Responses, errors
from lora_serve.api.services import ServicesDep
from lora_serve.api.tinker.future_results import PROTOBUF
from lora_serve.api.tinker.model_calls import CREATE, LOAD, PASS, SAMPLE, SAVE, STEP
from lora_serve.api.tinker.pass_codec import read_pass_header
from lora_serve.api.tinker.tinker_bodies import (
    LONGEST_TEXT,
    CreateModelBody,
    LoadWeightsBody,
    ModelBody,
    OptimStepBody,
    SaveSamplerBody,
    SaveWeightsBody,
)
from lora_serve.api.tinker.tinker_model import TinkerModel
from lora_serve.api.tinker.tinker_replies import FutureReply, ModelData, ModelReply, json_body, protobuf_body
from lora_serve.api.tinker.tinker_service import TinkerDep, TinkerService
from lora_serve.errors import BadRequest, ServeError

router = APIRouter(prefix="/api/v1", tags=["tinker"], route_class=JSONRoute)
REFUSALS: Responses = errors(404, 429)
EXTERNAL = "save_weights_external is not served: download what save_weights_for_sampler has published"


@router.post("/create_model", openapi_extra=json_body(CreateModelBody), responses=REFUSALS)
async def create_model(request: Request, tinker: TinkerDep, caller: Administrator) -> FutureReply:
    """Make a model: an adapter of the base, to be trained."""
    body, sent = await _read(request)
    return await _begin(tinker, caller.owner, CREATE, body, sent)


@router.post("/load_weights", openapi_extra=json_body(LoadWeightsBody), responses=REFUSALS)
async def load_weights(request: Request, tinker: TinkerDep, caller: Administrator) -> FutureReply:
    """Make a model from a checkpoint, or load one into a model."""
    body, sent = await _read(request)
    if "model_id" not in sent:
        return await _begin(tinker, caller.owner, LOAD, body, sent)
    return await _call(tinker, caller.owner, LOAD, body, sent)


@router.post("/get_info", responses=errors(404))
async def get_info(body: ModelBody, tinker: TinkerDep, services: ServicesDep, caller: Administrator) -> ModelReply:
    """Describe a model."""
    model = await tinker.model(body.model_id, caller.owner)
    if model.facts is None:
        raise BadRequest("the model is not made yet", param="model_id")
    info = engine_info(services)
    data = ModelData(arch=info.model, model_name=model.facts.base_model, tokenizer_id=info.root)
    return ModelReply(
        model_id=model.id, model_name=model.facts.base_model, model_data=data, lora_rank=model.facts.settings.r
    )


@router.post("/forward_backward", openapi_extra=protobuf_body(), responses=REFUSALS)
async def forward_backward(request: Request, tinker: TinkerDep, caller: Administrator) -> FutureReply:
    """Compute a loss, and add its gradients to those of a model."""
    if request.headers.get("Content-Type", "").partition(";")[0].strip() != PROTOBUF:
        raise UnsupportedMedia(f"the Content-Type must be {PROTOBUF}")
    body = await _bytes(request)
    header = read_pass_header(body)
    model = await tinker.model(header.model_id, caller.owner)
    return FutureReply(request_id=await model.accept(_seq(header.seq_id), PASS, body), model_id=model.id)


@router.post("/optim_step", openapi_extra=json_body(OptimStepBody), responses=REFUSALS)
async def optim_step(request: Request, tinker: TinkerDep, caller: Administrator) -> FutureReply:
    """Apply a model's gradients, and clear them."""
    return await _call(tinker, caller.owner, STEP, *await _read(request))


@router.post("/save_weights", openapi_extra=json_body(SaveWeightsBody), responses=REFUSALS)
async def save_weights(request: Request, tinker: TinkerDep, caller: Administrator) -> FutureReply:
    """Save a model's weights and optimizer."""
    return await _call(tinker, caller.owner, SAVE, *await _read(request))


@router.post("/save_weights_for_sampler", openapi_extra=json_body(SaveSamplerBody), responses=REFUSALS)
async def save_weights_for_sampler(request: Request, tinker: TinkerDep, caller: Administrator) -> FutureReply:
    """Save a model's weights so that they can be sampled from."""
    return await _call(tinker, caller.owner, SAMPLE, *await _read(request))


@router.post("/save_weights_external", openapi_extra=json_body(SaveWeightsBody), responses=REFUSALS)
async def save_weights_external(request: Request, tinker: TinkerDep, caller: Administrator) -> FutureReply:
    """Not served: the result is an error."""
    _, sent = await _read(request)
    model = await tinker.model(_text(sent, "model_id"), caller.owner)
    id_ = await model.refuse(_seq(sent.get("seq_id")), BadRequest(EXTERNAL))
    return FutureReply(request_id=id_, model_id=model.id)


async def _begin(tinker: TinkerService, owner: str, kind: str, body: bytes, sent: dict[str, Any]) -> FutureReply:
    session = await tinker.session(_text(sent, "session_id"), owner)
    number = sent.get("model_seq_id")
    if not isinstance(number, int) or not 0 <= number < 1 << 31:
        raise BadRequest("model_seq_id must be a number", param="model_seq_id")
    model = session.new_model(number)
    return await _accept(tinker, model, 0, kind, body)


async def _call(tinker: TinkerService, owner: str, kind: str, body: bytes, sent: dict[str, Any]) -> FutureReply:
    model = await tinker.model(_text(sent, "model_id"), owner)
    return await _accept(tinker, model, _seq(sent.get("seq_id")), kind, body)


async def _accept(tinker: TinkerService, model: TinkerModel, seq: int, kind: str, body: bytes) -> FutureReply:
    try:
        tinker.check_training()
    except ServeError as error:
        return FutureReply(request_id=await model.refuse(seq, error), model_id=model.id)
    return FutureReply(request_id=await model.accept(seq, kind, body), model_id=model.id)


async def _bytes(request: Request) -> bytes:
    return b"".join([chunk async for chunk in request.stream()])


async def _read(request: Request) -> tuple[bytes, dict[str, Any]]:
    """A JSON body, and what it says; the rest of it is validated when its turn comes."""
    body = await _bytes(request)
    sent = decode(body)
    if not isinstance(sent, dict):
        raise BadRequest("the body must be a JSON object")
    return body, sent


def _text(sent: dict[str, Any], field: str) -> str:
    value = sent.get(field)
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise BadRequest(f"{field} must be a text", param=field)
    return value


def _seq(value: Any) -> int:
    """The number of a call; those of clients begin at 1, and 0 is the one that makes the model."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadRequest("seq_id must be a number from 1 on", param="seq_id")
    return value
