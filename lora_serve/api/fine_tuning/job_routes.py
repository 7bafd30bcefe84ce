"""`/v1/fine_tuning`: OpenAI's fine-tuning jobs. A job belongs to the key that made it; to others it is a 404.

An admin key of all adapters sees every job. Making jobs needs an admin key, as everything does that publishes adapters.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as InPath

from lora_serve.api.auth import Administrator
from lora_serve.api.caller import Caller
from lora_serve.api.fine_tuning.event_stream import event_stream
from lora_serve.api.fine_tuning.file_store import FINE_TUNE, StoredFile, UnknownFile
from lora_serve.api.fine_tuning.job_objects import (
    CheckpointObject,
    CheckpointPage,
    DeletedJob,
    EventPage,
    JobObject,
    JobPage,
    checkpoint_object,
    checkpoint_objects,
    event_object,
    job_object,
)
from lora_serve.api.fine_tuning.job_queue import JobQueue
from lora_serve.api.fine_tuning.job_records import DataFile, JobRecord
from lora_serve.api.fine_tuning.job_schemas import CreateFineTuningJob
from lora_serve.api.fine_tuning.job_store import TRAINING, VALIDATION, unknown_job
from lora_serve.api.fine_tuning.trained_models import result_adapter
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.preprocess import base_names, engine_info
from lora_serve.api.openapi import errors
from lora_serve.api.request_record import Change, record_of
from lora_serve.api.services import Services, ServicesDep
from lora_serve.api.sse import SSEResponse
from lora_serve.errors import AdapterExists, AdapterNotFound, BadRequest, Unavailable
from lora_serve.messages import DescribeAlias
from lora_serve.names import check_adapter_name

MOST_JOBS_LISTED, MOST_LISTED, LISTED = 100, 1000, 20  # a job is large, and pages are made on the event loop
_METADATA = re.compile(r"metadata\[(.{0,64})\]", re.DOTALL)
NO_PERMISSIONS = (
    "this server has no projects to share checkpoints with: a key may use a checkpoint's model if it may use the "
    "adapter of that name"
)


def _training(services: ServicesDep, caller: Administrator) -> JobQueue:
    """The jobs, if this server trains. Raises `BadRequest` that says how it would."""
    if not engine_info(services).training_memory:
        raise BadRequest("this server does not train; to turn that on, start it with --training-memory 1GiB, or more")
    return services.jobs


Jobs = Annotated[JobQueue, Depends(_training)]
JobId = Annotated[str, InPath(description="the job's id")]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED)]
After = Annotated[str | None, Query(max_length=100, description="id of the last one of the page before")]


def _found(fine_tuning_job_id: JobId, jobs: Jobs, caller: Administrator) -> JobRecord:
    """The job in the path, if the caller may see it. Raises `UnknownJob`."""
    job = jobs.store.find(fine_tuning_job_id)
    if not may_see(caller, job):
        raise unknown_job(fine_tuning_job_id)
    return job


Job = Annotated[JobRecord, Depends(_found)]

router = APIRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"], route_class=JSONRoute, responses=errors(400))


def may_see(caller: Caller, job: JobRecord) -> bool:
    """Whether a job is the caller's, or the caller administers everything."""
    return job.tenant == caller.owner or (caller.admin and caller.adapters is None)


@router.post("/jobs", responses=errors(404, 507))
async def create_job(
    request: Request, body: CreateFineTuningJob, jobs: Jobs, services: ServicesDep, caller: Administrator
) -> JobObject:
    """Train an adapter on files of `/v1/files`, and publish it."""
    if body.model not in base_names(services):
        raise BadRequest(
            f"model {body.model[:100]} cannot be fine-tuned here; {engine_info(services).model} can", param="model"
        )
    settings, longest = body.run_settings, engine_info(services).max_model_len
    if settings.num_virtual_tokens >= longest - 1:
        raise BadRequest(
            f"{settings.num_virtual_tokens} virtual tokens leave no example to the {longest} tokens of the context",
            param="peft.num_virtual_tokens",
        )
    ids = {TRAINING: body.training_file, VALIDATION: body.validation_file}
    files = {
        name: await asyncio.to_thread(_file, services, id_, caller, f"{name}_file")
        for name, id_ in ids.items()
        if id_ is not None
    }
    id_ = jobs.store.new_id()
    suffix = body.suffix or ""
    adapter = result_adapter(suffix, id_[-10:]) if body.adapter is None else body.adapter
    caller.check_may_publish(check_adapter_name(adapter, engine_info(services).model), param="adapter")
    with suppress(AdapterNotFound, Unavailable):
        await services.engine.call(DescribeAlias(adapter))
        raise AdapterExists(f"{adapter} is an alias", param="adapter")
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    data = {name: DataFile(file.id, file.sha256, file.kind, file.examples) for name, (file, _) in files.items()}
    job = JobRecord(
        id=id_,
        tenant=caller.owner,
        organization=caller.name or "local",
        created_at=int(jobs.store.clock()),
        model=engine_info(services).model,
        adapter=adapter,
        training=data[TRAINING],
        validation=data.get(VALIDATION),
        method="supervised" if body.method is None else body.method.type,
        hyperparameters=body.chosen_hyperparameters,
        settings=msgspec.structs.replace(settings, seed=seed),
        trainer=body.trainer_settings,
        suffix=suffix,
        seed=seed,
        metadata=body.metadata,
        max_length=body.max_length,
    )
    made = await jobs.create(job, {name: path for name, (_, path) in files.items()})
    record_of(request.scope).changes.append(Change("create-job", made.id, made.training.sha256))
    return job_object(made, None)


@router.get("/jobs")
async def list_jobs(
    request: Request,
    jobs: Jobs,
    caller: Administrator,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=MOST_JOBS_LISTED)] = LISTED,
) -> JobPage:
    """This key's jobs, newest first; `metadata[key]=value` selects, and `metadata=null` those without any."""
    wanted = {match[1]: value for name, value in request.query_params.items() if (match := _METADATA.fullmatch(name))}
    without = request.query_params.get("metadata") == "null"
    found = [
        job
        for job in reversed(await asyncio.to_thread(jobs.store.list))
        if may_see(caller, job)
        and wanted.items() <= (job.metadata or {}).items()
        and not (without and job.metadata)
        and (after is None or job.id < after)
    ]
    data = [job_object(job, jobs.estimated_finish(job)) for job in found[:limit]]
    return JobPage(data=data, has_more=len(found) > limit)


@router.get("/jobs/{fine_tuning_job_id}", responses=errors(404))
async def retrieve_job(job: Job, jobs: Jobs) -> JobObject:
    """Describe a job."""
    return job_object(job, jobs.estimated_finish(job))


@router.delete("/jobs/{fine_tuning_job_id}", responses=errors(404))
async def delete_job(request: Request, job: Job, jobs: Jobs) -> DeletedJob:
    """Delete a finished job, its events and checkpoints, which OpenAI has no route for; what it published stays."""
    record_of(request.scope).changes.append(Change("delete-job", job.id))
    await jobs.delete(job.id)
    return DeletedJob(id=job.id)


@router.post("/jobs/{fine_tuning_job_id}/cancel", responses=errors(404))
async def cancel_job(request: Request, job: Job, jobs: Jobs) -> JobObject:
    """Cancel a job; its checkpoints stay."""
    record_of(request.scope).changes.append(Change("cancel-job", job.id))
    return job_object(await jobs.cancel(job.id), None)


@router.post("/jobs/{fine_tuning_job_id}/pause", responses=errors(404))
async def pause_job(request: Request, job: Job, jobs: Jobs) -> JobObject:
    """Pause a job: it saves where it is, and its memory is free for others."""
    record_of(request.scope).changes.append(Change("pause-job", job.id))
    return job_object(await jobs.pause(job.id), None)


@router.post("/jobs/{fine_tuning_job_id}/resume", responses=errors(404))
async def resume_job(request: Request, job: Job, jobs: Jobs) -> JobObject:
    """Resume a paused job, from where it was."""
    record_of(request.scope).changes.append(Change("resume-job", job.id))
    return job_object(await jobs.resume(job.id), None)


@router.get("/jobs/{fine_tuning_job_id}/events", response_model=EventPage, responses=errors(404))
async def list_events(
    job: Job,
    jobs: Jobs,
    after: After = None,
    limit: Limit = LISTED,
    stream: Annotated[bool, Query(description="server-sent events, oldest first, until the job has finished")] = False,
) -> EventPage | SSEResponse:
    """What happened to a job, newest first; with `stream`, all of it after the event `after`, as it happens."""
    if stream:
        return SSEResponse(event_stream(jobs, job.id, after), AsyncExitStack())
    found, more = await asyncio.to_thread(jobs.store.events(job.id).page, after, limit)
    return EventPage(data=[event_object(*each) for each in found], has_more=more)


@router.get("/jobs/{fine_tuning_job_id}/checkpoints", responses=errors(404))
async def list_checkpoints(job: Job, jobs: Jobs, after: After = None, limit: Limit = LISTED) -> CheckpointPage:
    """The checkpoints of a job that are kept: the last three, and the best one."""
    found = checkpoint_objects(job, await asyncio.to_thread(jobs.store.saves(job.id).checkpoints))
    found = [each for each in found if after is None or each.id < after]
    data = found[:limit]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return CheckpointPage(data=data, has_more=len(found) > limit, first_id=first, last_id=last)


@router.post("/jobs/{fine_tuning_job_id}/checkpoints", responses=errors(404))
async def create_checkpoint(request: Request, job: Job, jobs: Jobs) -> CheckpointObject:
    """Make a checkpoint of a running job as soon as its step is done, which OpenAI has no route for."""
    record_of(request.scope).changes.append(Change("create-checkpoint", job.id))
    return checkpoint_object(job, *await jobs.checkpoint(job.id))


@router.api_route("/checkpoints/{checkpoint:path}/permissions", methods=["GET", "POST"], include_in_schema=False)
@router.delete("/checkpoints/{checkpoint:path}/permissions/{permission_id}", include_in_schema=False)
async def permissions(caller: Administrator) -> None:
    """OpenAI's permissions of checkpoints, which are refused."""
    raise BadRequest(NO_PERMISSIONS)


def _file(services: Services, id_: str, caller: Caller, param: str) -> tuple[StoredFile, Path]:
    """A file to train with, and where its content is. Raises `BadRequest`, not a 404, as OpenAI does."""
    try:
        file, content = services.files.read(id_, caller.owner)
    except UnknownFile as error:
        raise BadRequest(error.message, param=param) from None
    content.close()
    if file.purpose != FINE_TUNE:
        raise BadRequest(f"file {file.id} has purpose {file.purpose}, not {FINE_TUNE}", param=param)
    return file, services.files.path(file)
