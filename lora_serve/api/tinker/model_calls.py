"""What each call of a model does with its training run, and the result that the client gets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from lora_serve.api.tinker.checkpoint_store import (
    LONGEST_TTL,
    SAMPLER,
    SHORTEST_TTL,
    STATE_FOLDER,
    TRAINING,
    ModelFacts,
    TinkerCheckpoint,
    check_checkpoint_name,
)
from lora_serve.api.tinker.future_results import PROTOBUF, FutureResult
from lora_serve.api.tinker.model_settings import run_settings
from lora_serve.api.tinker.ordered_calls import ModelCall
from lora_serve.api.tinker.pass_codec import decode_pass, encode_pass
from lora_serve.api.tinker.resumable_run import ResumableRun
from lora_serve.api.tinker.sampler_weights import PublishedWeights
from lora_serve.api.tinker.sampling_sessions import SamplingSession, SamplingSessions
from lora_serve.api.tinker.tinker_bodies import (
    CreateModelBody,
    LoadWeightsBody,
    OptimizerBody,
    OptimStepBody,
    SaveSamplerBody,
    SaveWeightsBody,
    read_body,
)
from lora_serve.api.tinker.tinker_model import TinkerModel
from lora_serve.errors import BadRequest
from lora_serve.training_messages import (
    OptimizerStep,
    PassResult,
    RestoreRun,
    SaveRun,
    StepResult,
)

CREATE, LOAD, PASS, STEP, SAVE, SAMPLE = "create", "load", "pass", "step", "save", "sample"  # kinds of calls


class ModelCalls:
    """Carries out the calls of one model.

    Args:
        samplers: of the model's session.
        sampler_id: the id of a sampling session by its number.
    """

    def __init__(self, model: TinkerModel, samplers: SamplingSessions, sampler_id: Callable[[int], str]) -> None:
        self._model, self._parts = model, model.parts
        self._samplers, self._sampler_id = samplers, sampler_id

    async def carry(self, call: ModelCall) -> FutureResult:
        """Carry out a call. Raises its `ServeError`."""
        match call.kind:
            case "create":
                return await self._create(read_body(CreateModelBody, call.body))
            case "load":
                return await self._load(call, read_body(LoadWeightsBody, call.body))
            case "pass":
                return await self._pass(call.body)
            case "step":
                return await self._step(call.body)
            case "save":
                return await self._save(call, read_body(SaveWeightsBody, call.body))
            case "sample":
                return await self._save_for_sampling(call, read_body(SaveSamplerBody, call.body))
        raise BadRequest(f"{call.kind} is not served here")

    @property
    def _run(self) -> ResumableRun:
        if self._model.run is None:
            raise BadRequest("the model was not made")
        return self._model.run

    @property
    def _facts(self) -> ModelFacts:
        assert self._model.facts is not None, "made together with the run"
        return self._model.facts

    async def _create(self, body: CreateModelBody) -> FutureResult:
        _check_optimizer(body.optimizer_config)
        base = self._parts.check_base_model(body.base_model)
        lora = body.lora_config
        layers = {name: getattr(lora, name) for name in ("train_mlp", "train_attn", "train_unembed")}
        settings = run_settings(lora, self._model.id)
        facts = ModelFacts(base, settings, layers, _metadata(body.user_metadata))
        await self._model.make_run(facts).start()
        return FutureResult.of({"model_id": self._model.id, "type": "create_model"})

    async def _load(self, call: ModelCall, body: LoadWeightsBody) -> FutureResult:
        """Into this model, or as the first call: into one that is made like the one that was saved."""
        if body.weights_access_token is not None:
            raise BadRequest("weights of other keys cannot be loaded", param="weights_access_token")
        checkpoint = await self._checkpoint(body.path)
        if call.seq == 0:
            _check_optimizer(body.optimizer_config)
            facts = checkpoint.model
            if body.base_model is not None:
                facts = msgspec.structs.replace(facts, base_model=self._parts.check_base_model(body.base_model))
            facts = msgspec.structs.replace(facts, metadata=_metadata(body.user_metadata))
            await self._model.make_run(facts).start()
        folder = str(self._parts.checkpoints.state(checkpoint))
        restore = RestoreRun(self._model.id, folder, body.optimizer)
        await self._run.change(lambda: restore, 0)
        await self._model.save_state(call.seq)  # the checkpoint may be deleted before this has to be repeated
        return FutureResult.of({"path": body.path, "model_id": self._model.id, "type": "load_weights"})

    async def _pass(self, body: bytes) -> FutureResult:
        operation = await asyncio.to_thread(decode_pass, body, self._model.id)
        if operation.forward_only:
            result = await self._run.ask(operation)
        else:
            result = await self._run.change(partial(decode_pass, body, self._model.id), len(body))
        return FutureResult(PROTOBUF, encode_pass(msgspec.convert(result, PassResult)))

    async def _step(self, body: bytes) -> FutureResult:
        given = read_body(OptimStepBody, body).adam_params
        operation = OptimizerStep(
            self._model.id,
            given.learning_rate,
            (given.beta1, given.beta2),
            given.eps,
            given.weight_decay,
            given.grad_clip_norm,
        )
        result = msgspec.convert(await self._run.change(lambda: operation, len(body)), StepResult)
        metrics = {"grad_norm:mean": result.grad_norm, "learning_rate:mean": given.learning_rate}
        return FutureResult.of({"metrics": metrics, "type": "optim_step"})

    async def _save(self, call: ModelCall, body: SaveWeightsBody) -> FutureResult:
        checkpoints = self._parts.checkpoints
        saved = await asyncio.to_thread(checkpoints.saved_by, self._model.id, call.seq)
        if saved is None:
            new = self._new(call, TRAINING, body.path, body.ttl_seconds, body.user_metadata)
            if not body.overwrite and await self._exists(new):
                raise BadRequest(f"there is a checkpoint {new.path} already; overwrite=True replaces it", param="path")
            id_, folder = await asyncio.to_thread(checkpoints.begin)
            try:
                await self._run.ask(SaveRun(self._model.id, str(folder / STATE_FOLDER)))
            except BaseException:
                checkpoints.discard(folder)
                raise
            new = msgspec.structs.replace(new, id=id_)
            saved = await asyncio.to_thread(checkpoints.add, new, folder)
        return FutureResult.of({"path": saved.path, "type": "save_weights"})

    async def _save_for_sampling(self, call: ModelCall, body: SaveSamplerBody) -> FutureResult:
        if body.path is None:
            return await self._save_ephemeral(body)
        checkpoints = self._parts.checkpoints
        saved = await asyncio.to_thread(checkpoints.saved_by, self._model.id, call.seq)
        if saved is None:
            new = self._new(call, SAMPLER, body.path, body.ttl_seconds, body.user_metadata)
            older = await self._of_path(new)
            published = await self._publish(durable=True)
            id_, folder = await asyncio.to_thread(checkpoints.begin)
            new = msgspec.structs.replace(new, id=id_, adapter=published.adapter, digest=published.digest)
            saved = await asyncio.to_thread(checkpoints.add, new, folder)
            for each in older:
                await self._parts.weights.delete(each.adapter)
        return FutureResult.of({"path": saved.path, "type": "save_weights_for_sampler"})

    async def _save_ephemeral(self, body: SaveSamplerBody) -> FutureResult:
        if body.sampling_session_seq_id is None:
            raise BadRequest("path or sampling_session_seq_id is needed", param="path")
        id_ = self._sampler_id(body.sampling_session_seq_id)
        if self._samplers.get(id_) is None:
            published = await self._publish(durable=False)
            sampler = SamplingSession(
                id_, self._facts.base_model, None, published.adapter, published.digest, self._model.id
            )
            for adapter in self._samplers.add(sampler):
                await self._parts.weights.delete(adapter)
        return FutureResult.of({"sampling_session_id": id_, "type": "save_weights_for_sampler"})

    async def _publish(self, *, durable: bool) -> PublishedWeights:
        return await self._parts.weights.publish(self._run, self._model.owner, durable=durable)

    async def _checkpoint(self, path: str) -> TinkerCheckpoint:
        found = await asyncio.to_thread(self._parts.checkpoints.find, path, self._model.owner)
        if found.kind != TRAINING:
            raise BadRequest("these are weights for sampling; load what save_weights saved", param="path")
        return found

    def _new(
        self, call: ModelCall, kind: str, name: str | None, ttl: int | None, metadata: dict[str, str] | None
    ) -> TinkerCheckpoint:
        name = check_checkpoint_name(f"{call.seq:06d}" if name is None else name)
        if ttl is not None and not SHORTEST_TTL <= ttl <= LONGEST_TTL:
            raise BadRequest(f"ttl_seconds is {SHORTEST_TTL} to {LONGEST_TTL}", param="ttl_seconds")
        now = time.time()
        expires = None if ttl is None else now + ttl
        return TinkerCheckpoint(
            "", self._model.owner, self._model.id, kind, name, call.seq, now, expires, 0, self._facts, metadata or {}
        )

    async def _exists(self, new: TinkerCheckpoint) -> bool:
        return bool(await self._of_path(new))

    async def _of_path(self, new: TinkerCheckpoint) -> list[TinkerCheckpoint]:
        own = await asyncio.to_thread(self._parts.checkpoints.list, self._model.owner)
        return [each for each in own if each.path == new.path]


def _check_optimizer(given: OptimizerBody) -> None:
    if given.type != "adamw":
        raise BadRequest(f"the optimizer {given.type[:100]} is not served; adamw is", param="optimizer_config")


def _metadata(given: dict[str, Any] | None) -> dict[str, str]:
    return {str(name): str(value) for name, value in (given or {}).items()}
