"""OpenAI's objects of the fine-tuning routes, with every field, and how records become them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from pydantic import BaseModel

from lora_serve.api.fine_tuning.job_records import (
    CheckpointRecord,
    Hyperparameters,
    JobError,
    JobEvent,
    JobRecord,
    SaveRecord,
    Status,
)
from lora_serve.api.fine_tuning.peft_options import shown_settings


class JobErrorObject(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class HyperparametersObject(BaseModel):
    """What the job trains with; "auto" until that is chosen."""

    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]


class JobObject(BaseModel):
    """OpenAI's fine-tuning job. `lora`, `peft`, `trainer`, `adapter`, `max_length`, `training` are this server's."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Status
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: HyperparametersObject
    method: dict[str, Any]
    seed: int
    trained_tokens: int | None
    estimated_finish: int | None
    error: JobErrorObject | None
    metadata: dict[str, str] | None
    integrations: list[Any]
    adapter: str
    lora: dict[str, Any] | None
    peft: dict[str, Any]
    trainer: dict[str, Any]
    max_length: int | None
    training: dict[str, Any]


class EventObject(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class CheckpointObject(BaseModel):
    """A checkpoint of a job, which can be used as a model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class DeletedJob(BaseModel):
    """The id of the job that was deleted."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    deleted: Literal[True] = True


class JobPage(BaseModel):
    """A page of jobs, newest first; `after=<last id>` asks for the next one."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class EventPage(BaseModel):
    """A page of events, newest first; `after=<last id>` asks for the next one."""

    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointPage(BaseModel):
    """A page of checkpoints, newest first; `after=<last id>` asks for the next one."""

    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


def job_object(job: JobRecord, estimated_finish: int | None) -> JobObject:
    """A job as clients see it."""
    asked, numbers = job.hyperparameters, job.numbers
    chosen = asked
    if numbers is not None:
        chosen = Hyperparameters(
            n_epochs=numbers.n_epochs,
            batch_size=numbers.batch_size,
            learning_rate_multiplier=numbers.learning_rate_multiplier,
            beta=numbers.beta,
        )
    peft = shown_settings(job.settings)
    shown = {name: value for name, value in msgspec.to_builtins(chosen).items() if value is not None}
    return JobObject(
        id=job.id,
        created_at=job.created_at,
        finished_at=job.finished_at,
        model=job.model,
        fine_tuned_model=job.model_name if job.status == "succeeded" else None,
        organization_id=job.organization,
        status=job.status,
        training_file=job.training.id,
        validation_file=None if job.validation is None else job.validation.id,
        result_files=list(job.result_files),
        hyperparameters=HyperparametersObject(
            n_epochs=chosen.n_epochs,
            batch_size=chosen.batch_size,
            learning_rate_multiplier=chosen.learning_rate_multiplier,
        ),
        method={"type": job.method, job.method: {"hyperparameters": shown}},
        seed=job.seed,
        trained_tokens=job.trained_tokens,
        estimated_finish=estimated_finish,
        error=None if job.error is None else _error(job.error),
        metadata=job.metadata,
        integrations=[],
        adapter=job.adapter if job.digest is None else f"{job.adapter}@{job.digest[:12]}",
        lora=peft if job.settings.peft_type == "LORA" else None,
        peft=peft,
        trainer=msgspec.to_builtins(job.trainer),
        max_length=job.max_length,
        training={
            "steps": job.steps,
            "learning_rate": None if numbers is None else numbers.learning_rate,
            "training_data": msgspec.to_builtins(job.training),
            "validation_data": msgspec.to_builtins(job.validation),
        },
    )


def event_object(id_: str, event: JobEvent) -> EventObject:
    """An event as clients see it."""
    return EventObject(
        id=id_,
        created_at=event.created_at,
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )


def checkpoint_objects(job: JobRecord, checkpoints: list[tuple[int, SaveRecord]]) -> list[CheckpointObject]:
    """Checkpoints as clients see them, newest first."""
    return [
        checkpoint_object(job, step, save.checkpoint)
        for step, save in reversed(checkpoints)
        if save.checkpoint is not None
    ]


def checkpoint_object(job: JobRecord, step: int, checkpoint: CheckpointRecord) -> CheckpointObject:
    """A checkpoint as clients see it."""
    return CheckpointObject(
        id=checkpoint.id,
        created_at=checkpoint.created_at,
        fine_tuned_model_checkpoint=job.checkpoint_name(step),
        fine_tuning_job_id=job.id,
        step_number=step,
        metrics=checkpoint.metrics,
    )


def _error(error: JobError) -> JobErrorObject:
    return JobErrorObject(code=error.code, message=error.message, param=error.param)
