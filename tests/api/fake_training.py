"""A fake engine with training runs, and jobs on top of it with and without HTTP.

A run's weights are a hash of everything that it learnt, in order: two runs have the same weights only if they did the
same.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
from openai import AsyncOpenAI
from stub_admin import CONFIG, StubAdminEngine, engine_info
from stub_completions import EOS, byte_tokenizer

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.app import create_app
from lora_serve.api.fine_tuning.file_store import FINE_TUNE, FileStore
from lora_serve.api.fine_tuning.job_control import Intervals
from lora_serve.api.fine_tuning.job_queue import JobQueue
from lora_serve.api.fine_tuning.job_records import (
    DataFile,
    Hyperparameters,
    JobRecord,
    MethodName,
    TrainerSettings,
)
from lora_serve.api.fine_tuning.job_results import JobResults
from lora_serve.api.fine_tuning.job_store import TRAINING, VALIDATION, JobStore
from lora_serve.api.key_file import Keys
from lora_serve.config import ServeConfig
from lora_serve.errors import Overloaded, RunExists, RunNotFound, StorageFull, Unavailable
from lora_serve.messages import Operation, Publish
from lora_serve.training_messages import (
    CloseRun,
    CreateRun,
    ExportRun,
    ForwardBackward,
    OptimizerStep,
    PassResult,
    RestoreRun,
    RunInfo,
    RunSettings,
    SaveRun,
    StepResult,
)

CONTEXT = 64
COMPLETIONS = [json.dumps({"prompt": f"{number}\n", "completion": f"{number * number}"}) for number in range(12)]
PREFERENCES = [
    json.dumps(
        {
            "input": {"messages": [{"role": "user", "content": str(number)}]},
            "preferred_output": [{"role": "assistant", "content": "yes"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
    )
    for number in range(12)
]
QUICK = Intervals(save=1000.0, retry=0.01, engine=0.01)


@dataclass
class FakeRun:
    weights: str = "new"
    gradients: list[str] = field(default_factory=list)
    steps: int = 0


class FakeTrainingEngine(StubAdminEngine):
    """Trains by hashing.

    Attributes:
        after: called with every operation of a run that was carried out, before it is answered.
        memory: how many runs there may be.
        full: whether the disk is full.
        diverges: whether losses are no numbers.
        dies_of_publishing: whether it is lost, and back at once, when an adapter is published.
        validation_losses: what passes without gradients find, in turn; then 1.
    """

    def __init__(self, store: Path) -> None:
        super().__init__()
        self.info = engine_info(store, max_model_len=CONTEXT, eos_token_ids=(EOS,), training_memory=1 << 20)
        self.runs: dict[str, FakeRun] = {}
        self.after: Callable[[Any], Awaitable[None]] | None = None
        self.memory = 10
        self.full = False
        self.trained: list[Any] = []
        self.diverges = False
        self.dies_of_publishing = False
        self.validation_losses: list[float] = []
        self.most_at_once = 0

    async def call(self, operation: Operation) -> Any:
        if not self.alive or (not self.ready and isinstance(operation, CreateRun)):
            raise Unavailable("the engine is not running, or drains")
        if isinstance(operation, Publish) and self.dies_of_publishing:
            self.die()
            raise Unavailable("the engine ended")
        if not hasattr(operation, "run"):
            return await super().call(operation)
        restarts = self.restarts
        await asyncio.sleep(0)
        result = self._train(operation)
        self.trained.append(operation)
        if self.after is not None:
            await self.after(operation)
        if self.restarts != restarts or not self.alive:
            raise Unavailable("the engine ended")
        return msgspec.to_builtins(result)

    def die(self) -> None:
        """Lose all runs, and be back at once."""
        self.runs.clear()
        self.restarts += 1

    def _train(self, operation: Any) -> Any:
        if isinstance(operation, CreateRun):
            if operation.run in self.runs:
                raise RunExists("there is one")
            if len(self.runs) >= self.memory:
                raise Overloaded("there is no memory")
            self.runs[operation.run] = FakeRun()
            self.most_at_once = max(self.most_at_once, len(self.runs))
            return RunInfo(operation.run, 1, 1, 0)
        if isinstance(operation, CloseRun):
            self.runs.pop(operation.run, None)
            return None
        if operation.run not in self.runs:
            raise RunNotFound("there is none")
        run = self.runs[operation.run]
        match operation:
            case ForwardBackward():
                return self._pass(run, operation)
            case OptimizerStep():
                run.weights = _hash(run.weights, *run.gradients, str(operation.learning_rate))
                run.gradients.clear()
                run.steps += 1
                return StepResult(1.0, run.steps)
            case SaveRun(folder=folder) | ExportRun(folder=folder):
                if self.full:
                    raise StorageFull("the disk of the store is full")
                Path(folder).mkdir()
                if isinstance(operation, SaveRun):
                    (Path(folder) / "state").write_text(json.dumps([run.weights, run.steps]))
                else:
                    (Path(folder) / "adapter_config.json").write_bytes(CONFIG)
                    (Path(folder) / "adapter_model.safetensors").write_text(run.weights)
                return None
            case RestoreRun(folder=folder):
                run.weights, run.steps = json.loads((Path(folder) / "state").read_text())
                return RunInfo(operation.run, 1, 1, run.steps)

    def _pass(self, run: FakeRun, operation: ForwardBackward) -> PassResult:
        encoded = hashlib.sha256(msgspec.msgpack.encode(operation.examples)).hexdigest()
        tokens = sum(len(each.tokens) for each in operation.examples)
        logprobs = [
            [-(0.5 if run.weights == "new" else 0.25) * bool(weight) for weight in each.inputs["weights"]]
            for each in operation.examples
        ]
        if operation.loss == "dpo":
            pairs = len(operation.examples) // 2
            loss, metrics = 0.7 * pairs, {"rewards_accuracy": 0.5}
        else:
            loss = sum(0.5 * weight for each in operation.examples for weight in each.inputs["weights"])
            metrics = {}
        if operation.forward_only:
            weights = sum(weight for each in operation.examples for weight in each.inputs["weights"])
            loss = weights * (self.validation_losses.pop(0) if self.validation_losses else 1.0)
        else:
            run.gradients.append(encoded)
        loss = float("nan") if self.diverges else loss
        learnt = sum(bool(weight) for each in operation.examples for weight in each.inputs["weights"])
        return PassResult(loss, logprobs, metrics, tokens, hits=learnt)


def _hash(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


class Jobs:
    """A queue of jobs over a fake engine, without HTTP."""

    def __init__(
        self,
        root: Path,
        *,
        most: int = 10,
        intervals: Intervals = QUICK,
        disk: Disk | None = None,
        engine: FakeTrainingEngine | None = None,
    ) -> None:
        self.root = root
        self.engine = engine or FakeTrainingEngine(root)
        self.store = JobStore(lambda: root / "jobs", disk=disk)
        self.files = FileStore(lambda: root / "files", 1 << 30)
        self.results = JobResults(self.store, self.engine, self.files, lambda: root / "staging")
        self.queue = JobQueue(self.store, self.engine, byte_tokenizer(), self.results, most, intervals)

    def file(self, lines: list[str], kind: str = "completion") -> tuple[DataFile, Path]:
        """A file that was uploaded."""
        folder = self.root / f"upload-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        (folder / "content").write_text("\n".join(lines))
        file = self.files.add(
            folder, tenant="", filename="a", purpose=FINE_TUNE, sha256="0", kind=kind, examples=len(lines)
        )
        return DataFile(file.id, file.sha256, file.kind, file.examples), self.files.path(file)

    async def create(
        self,
        lines: list[str] = COMPLETIONS,
        *,
        kind: str = "completion",
        method: MethodName = "supervised",
        validation: list[str] | None = None,
        tenant: str = "",
        adapter: str = "",
        seed: int = 1,
        trainer: TrainerSettings | None = None,
        **numbers: Any,
    ) -> str:
        """Begin a job of three epochs of three steps; returns its id."""
        training, path = self.file(lines, kind)
        files, measured = {TRAINING: path}, None
        if validation is not None:
            measured, files[VALIDATION] = self.file(validation, kind)
        id_ = self.store.new_id()
        job = JobRecord(
            id=id_, tenant=tenant, organization="local", created_at=1, model="base",
            adapter=adapter or f"ft-{id_[-10:]}", training=training, validation=measured, method=method,
            hyperparameters=Hyperparameters(**({"n_epochs": 3, "batch_size": 4} | numbers)), settings=RunSettings(),
            trainer=trainer or TrainerSettings(), suffix="", seed=seed, metadata=None,
        )  # fmt: skip
        await self.queue.create(job, files)
        return id_

    async def until(self, id_: str, *statuses: str) -> JobRecord:
        """Wait for one of these statuses, or the end; returns the job."""
        async with asyncio.timeout(10):
            while True:
                job = self.store.find(id_)
                if job.status in statuses or job.finished:
                    return job
                await asyncio.sleep(0.002)

    async def end(self, id_: str) -> JobRecord:
        """Wait until a job has finished and nothing runs for it any more."""
        job = await self.until(id_)
        async with asyncio.timeout(10):
            while self.queue._runner(id_) is not None:
                await asyncio.sleep(0.002)
        return job

    def messages(self, id_: str) -> list[str]:
        """Messages of its events but metrics, oldest first."""
        found, _ = self.store.events(id_).page(None, 1000)
        return [event.message for _, event in reversed(found) if event.type == "message"]

    def steps(self, id_: str) -> list[int]:
        """Steps of its metrics events."""
        return [event.data["step"] for event in self.store.events(id_).metrics() if event.data]

    @property
    def result(self) -> str:
        """Weights of the version that was published last."""
        return self.engine.published[-1]["adapter_model.safetensors"].decode()


def when(engine: FakeTrainingEngine, kind: type, number: int, act: Callable[[], Any]) -> None:
    """Let something happen, once, after the operation of this kind and number, counted from 1."""
    seen: Counter[type] = Counter()

    async def after(operation: Any) -> None:
        seen[type(operation)] += 1
        if isinstance(operation, kind) and seen[type(operation)] == number:
            happened = act()
            if asyncio.iscoroutine(happened):
                await happened

    engine.after = after


class TrainingApp:
    """The application over a fake engine that trains; use as an async context manager."""

    def __init__(self, store: Path, keys: Keys | None = None, **options: Any) -> None:
        self.engine = FakeTrainingEngine(store)
        self.app = create_app(self.engine, byte_tokenizer(), ServeConfig(model="base", store=store, **options), keys)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def __aenter__(self) -> TrainingApp:
        self._life = self.app.router.lifespan_context(self.app)
        await self._life.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._life.__aexit__(None, None, None)

    def sdk(self, key: str = "any") -> AsyncOpenAI:
        """OpenAI's SDK as a client."""
        return AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=self.http, max_retries=0)
