"""Records of fine-tuning jobs, as they are kept on disk."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from lora_serve.learning_rate import Decay
from lora_serve.training_messages import RunSettings

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("validating_files", "queued", "running", "paused")
MethodName = Literal["supervised", "dpo"]
Auto = Literal["auto"]


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's hyperparameters as they were sent. `beta` is of `dpo` only."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"
    beta: float | Auto | None = None


class ChosenNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers that a job trains with.

    Attributes:
        learning_rate: after the warm-up.
        warmup: optimizer steps.
    """

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    beta: float | None
    learning_rate: float
    warmup: int


class TrainerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a job trains, in the words of transformers' `TrainingArguments`.

    Attributes:
        learning_rate: None: by OpenAI's multiplier.
        warmup_ratio: share of all steps.
        early_stopping_patience: epochs in a row without a lower validation loss, after which training ends.
        load_best_model_at_end: whether the result is the checkpoint with the lowest validation loss.
    """

    learning_rate: float | None = None
    lr_scheduler_type: Decay = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    early_stopping_patience: int | None = None
    load_best_model_at_end: bool = False


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed; `param`: the field of the job that is to blame."""

    code: str
    message: str
    param: str | None = None


class DataFile(msgspec.Struct, frozen=True):
    """A file that a job learns from or is measured with.

    Attributes:
        kind: of its examples.
        examples: how many lines there are.
    """

    id: str
    sha256: str
    kind: str | None
    examples: int


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A fine-tuning job.

    Attributes:
        tenant: whose it is, as `Caller.owner` says.
        organization: name of that key; empty without keys.
        created_at, finished_at: Unix time in seconds.
        model: name of the base.
        adapter: name under which the result is published.
        max_length: tokens of an example, beyond which it is cut; None: the base's context.
        numbers, steps: what it trains with, and how many optimizer steps; None until the files are validated.
        trained_tokens: tokens that it has computed for training.
        digest: of the version that is its result.
    """

    id: str
    tenant: str
    organization: str
    created_at: int
    model: str
    adapter: str
    training: DataFile
    validation: DataFile | None
    method: MethodName
    hyperparameters: Hyperparameters
    settings: RunSettings
    trainer: TrainerSettings
    suffix: str
    seed: int
    metadata: dict[str, str] | None
    max_length: int | None = None
    status: Status = "validating_files"
    numbers: ChosenNumbers | None = None
    steps: int | None = None
    trained_tokens: int | None = None
    finished_at: int | None = None
    error: JobError | None = None
    result_files: tuple[str, ...] = ()
    digest: str | None = None

    @property
    def finished(self) -> bool:
        return self.status not in UNFINISHED

    @property
    def model_name(self) -> str:
        """The name of the result, as OpenAI makes it; the job has it before there is a result."""
        return f"ft:{self.model}:{self.organization}:{self.suffix}:{self.short_id}"

    @property
    def short_id(self) -> str:
        return self.id[-10:]

    def checkpoint_name(self, step: int) -> str:
        """The name of a checkpoint, as OpenAI makes it."""
        return f"{self.model_name}:ckpt-step-{step}"


class JobEvent(msgspec.Struct, frozen=True):
    """Something that happened to a job; `data` of a metrics event are its numbers."""

    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


class Position(msgspec.Struct, frozen=True):
    """Where training is; together with the run's weights and optimizer it says how it goes on, bit by bit.

    Attributes:
        step: optimizer steps done.
        tokens: computed for training so far.
        best_loss, best_step: the lowest validation loss, and the checkpoint that has it.
        worse: epochs since then.
    """

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0


class CheckpointRecord(msgspec.Struct, frozen=True):
    """A checkpoint of `/v1/fine_tuning/jobs/{id}/checkpoints`."""

    id: str
    created_at: int
    metrics: dict[str, float]


class SaveRecord(msgspec.Struct, frozen=True):
    """A saved run; with a checkpoint, its adapter's PEFT files are there as well."""

    position: Position
    checkpoint: CheckpointRecord | None = None
