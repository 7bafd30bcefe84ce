"""A stub engine that trains a single number, an app on top of it, and a client of Tinker's routes.

A run's weight begins at 0. A pass adds the sum of all weights (inputs) to its gradient and finds log-probabilities of
minus its weight; a step adds gradient x learning rate to the weight. So what was done twice, or not at all, is seen.
"""

from __future__ import annotations

import asyncio
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
from stub_completions import CONTEXT, StubCompletionApp, StubCompletionEngine

from lora_serve.api.tinker.protobuf_messages import ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse
from lora_serve.errors import BadRequest, RunExists, RunNotFound, Unavailable
from lora_serve.messages import Operation, Publish
from lora_serve.training_messages import (
    CloseRun,
    CreateRun,
    ForwardBackward,
    OptimizerStep,
    PassResult,
    PublishRun,
    RestoreRun,
    RunInfo,
    RunOperation,
    RunSettings,
    SaveRun,
    StepResult,
)

PREFIX = "/api/v1/"


@dataclass
class StubRun:
    settings: RunSettings
    weight: float = 0.0
    gradient: float = 0.0
    steps: int = 0


class StubTrainingEngine(StubCompletionEngine):
    """`lost_at`: the number of an operation on runs, counted over all engines, at which the engine ends."""

    def __init__(self, store: Path, context: int = CONTEXT) -> None:
        super().__init__(store, context)
        assert self.info is not None
        self.info = msgspec.structs.replace(self.info, training_memory=1 << 20)
        self.runs: dict[str, StubRun] = {}
        self.count = 0
        self.lost_at: set[int] = set()
        self.passes: list[ForwardBackward] = []
        self.gate: asyncio.Event | None = None  # passes wait for it

    def lose(self) -> None:
        """End the engine and start it again."""
        self.runs.clear()
        self.restarts += 1

    async def call(self, operation: Operation) -> Any:
        if not isinstance(operation, RunOperation | PublishRun):
            return await super().call(operation)
        self.count += 1
        if self.count in self.lost_at:
            self.lose()
            raise Unavailable("the engine ended while it served this request", retry_after=1)
        if isinstance(operation, ForwardBackward) and self.gate is not None:
            await self.gate.wait()
        if isinstance(operation, PublishRun):
            self._run(operation.run)
            self.resolves[operation.name] = "poet"
            folder = Path(str(self.info.store)) / operation.name  # type: ignore[union-attr]
            folder.mkdir()
            return await super().call(Publish(operation.name, str(folder)))
        return msgspec.to_builtins(self._train(operation))

    def _train(self, operation: RunOperation) -> Any:
        name = operation.run
        if isinstance(operation, CloseRun):
            self.runs.pop(name, None)
            return None
        if isinstance(operation, CreateRun):
            if name in self.runs:
                raise RunExists("there is one already")
            self.runs[name] = StubRun(operation.settings)
            return RunInfo(name, 1, 4, 0)
        run = self._run(name)
        match operation:
            case ForwardBackward(examples=examples, loss=loss):
                if loss == "nonsense":
                    raise BadRequest("'nonsense' is no loss function", param="loss")
                self.passes.append(operation)
                if not operation.forward_only:
                    run.gradient += sum(sum(each.inputs["weights"]) for each in examples)
                logprobs = [[-run.weight] * len(each.targets) for each in examples]
                return PassResult(run.weight, logprobs, {"ratio": 1.5}, sum(len(each.tokens) for each in examples))
            case OptimizerStep(learning_rate=rate):
                norm, run.gradient = abs(run.gradient), 0.0 * (change := run.gradient * rate)
                run.weight, run.steps = run.weight + change, run.steps + 1
                return StepResult(norm, run.steps)
            case SaveRun(folder=folder):
                Path(folder).mkdir()
                (Path(folder) / "state.json").write_text(json.dumps({"weight": run.weight, "steps": run.steps}))
                return None
            case RestoreRun(folder=folder, optimizer=optimizer):
                state = json.loads((Path(folder) / "state.json").read_text())
                kept = replace(run, weight=state["weight"], steps=state["steps"] if optimizer else 0, gradient=0.0)
                self.runs[name] = kept
                return RunInfo(name, 1, 4, kept.steps)
        raise AssertionError(operation)

    def _run(self, name: str) -> StubRun:
        if name not in self.runs:
            raise RunNotFound("there is no training run")
        return self.runs[name]


class StubTrainingApp(StubCompletionApp):
    """An app on a `StubTrainingEngine`, started as a server starts it; use as a context manager."""

    make_engine = StubTrainingEngine
    engine: StubTrainingEngine

    async def __aenter__(self) -> StubTrainingApp:
        self.lifespan = self.app.router.lifespan_context(self.app)
        await self.lifespan.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.lifespan.__aexit__(None, None, None)

    async def send(self, path: str, body: dict[str, Any] | bytes, key: str = "tml-any") -> httpx.Response:
        headers = {"X-API-Key": key}
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/x-protobuf"
            return await self.client.post(PREFIX + path, content=body, headers=headers)
        return await self.client.post(PREFIX + path, json=body, headers=headers)

    async def ask(self, path: str, body: dict[str, Any] | bytes, key: str = "tml-any") -> Any:
        """The JSON of a successful response."""
        answer = await self.send(path, body, key)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def result(self, request_id: str, key: str = "tml-any") -> Any:
        """The JSON of a result, or its protobuf as bytes."""
        answer = await self.send("retrieve_future", {"request_id": request_id}, key)
        assert answer.status_code == 200, answer.text
        return answer.json() if answer.headers["Content-Type"] == "application/json" else answer.content

    async def call(self, path: str, body: dict[str, Any] | bytes, key: str = "tml-any") -> Any:
        """The result of a request that is accepted."""
        return await self.result((await self.ask(path, body, key))["request_id"], key)

    async def session(self, key: str = "tml-any") -> str:
        return str((await self.ask("create_session", {"tags": [], "type": "create_session"}, key))["session_id"])

    async def model(self, session: str, number: int = 0, key: str = "tml-any", **lora: Any) -> str:
        body = {
            "session_id": session, "model_seq_id": number, "base_model": "any:base", "type": "create_model",
            "lora_config": {"rank": 8, "train_unembed": True, "train_mlp": True, "train_attn": True} | lora,
            "optimizer_config": {"type": "adamw"},
        }  # fmt: skip
        made = await self.call("create_model", body, key)
        assert made == {"model_id": f"{session}:train:{number}", "type": "create_model"}
        return str(made["model_id"])

    async def train(self, model: str, seq: int, weight: float = 1.0, **more: Any) -> float:
        """A pass with one datum of this weight; returns the log-probability that it finds."""
        output = ForwardBackwardOutput.FromString(await self.call("forward_backward", pass_body(model, seq, weight)))
        (record,) = output.loss_fn_outputs
        (value,) = memoryview(record.fields["logprobs"].data).cast("f")
        return float(value)

    async def step(self, model: str, seq: int, rate: float = 1.0) -> Any:
        return await self.call("optim_step", step_body(model, seq, rate))


def pass_body(model: str, seq: int, weight: float = 1.0, loss: str = "cross_entropy", only: bool = False) -> bytes:
    """A request with one datum of one token."""
    request = ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss, forward_only=only)
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = struct.pack("<i", 5)
    for name, kind, data in (("target_tokens", 2, struct.pack("<q", 6)), ("weights", 1, struct.pack("<f", weight))):
        tensor = datum.loss_fn_inputs[name]
        tensor.dense, tensor.dtype = data, kind
        tensor.shape.append(1)
    return bytes(request.SerializeToString())


def step_body(model: str, seq: int, rate: float = 1.0) -> dict[str, Any]:
    return {"model_id": model, "seq_id": seq, "type": "optim_step", "adam_params": {"learning_rate": rate}}


def sample_body(sampler: str, seq: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler, "seq_id": seq, "type": "sample", "num_samples": 1, "prompt_logprobs": False,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [104, 105]}]},
        "sampling_params": {"max_tokens": 4, "temperature": 1.0, "top_k": -1, "top_p": 1.0},
    } | more  # fmt: skip


def samples(data: bytes) -> list[list[int]]:
    """The tokens of a sample's sequences."""
    return [memoryview(each.tokens).cast("i").tolist() for each in SampleResponse.FromString(data).sequences]
