"""Which fine-tuning jobs run: a few at a time, keys by turns, those of a key in the order in which they came.

Everything here runs on the event loop, so that a job's status changes between two awaits only. What is unfinished when
the server starts goes on by itself, except for what was paused.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from lora_serve.api.fine_tuning.job_control import Intervals, TrainingEngine
from lora_serve.api.fine_tuning.job_records import CheckpointRecord, JobEvent, JobRecord
from lora_serve.api.fine_tuning.job_results import JobResults
from lora_serve.api.fine_tuning.job_runner import JobRunner
from lora_serve.api.fine_tuning.job_store import JobStore
from lora_serve.errors import BadRequest, ServeError, StorageFull, Unavailable
from lora_serve.job_metrics import RunningJob

VALIDATED_AT_ONCE = 2

log = logging.getLogger(__name__)


class JobQueue:
    """The jobs of a server that are not finished.

    Args:
        most: jobs that train at once.
    """

    def __init__(
        self,
        store: JobStore,
        engine: TrainingEngine,
        tokenizer: Any,
        results: JobResults,
        most: int,
        intervals: Intervals | None = None,
    ) -> None:
        self.store = store
        self._engine, self._tokenizer, self._results, self._most = engine, tokenizer, results, most
        self._intervals = intervals or Intervals()
        self._validating: dict[str, JobRunner] = {}
        self._training: dict[str, JobRunner] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._validating)} validated, {len(self._training)} trained>"

    async def start(self) -> None:
        """Let unfinished jobs go on."""
        try:
            await asyncio.to_thread(self.store.open)
        except ServeError as error:
            log.error("fine-tuning jobs: %s", error.message)
            return
        for job in self.store.list():
            if job.status == "running":
                self.store.update(job.id, lambda job: msgspec.structs.replace(job, status="queued"), on_disk=False)
        unfinished = sum(not job.finished for job in self.store.list())
        if unfinished and not self._trains:
            log.warning("%d fine-tuning jobs wait until the server is started with --training-memory", unfinished)
        self._fill()

    async def drain(self, timeout: float) -> None:
        """Let jobs that train save where they are, when the engine takes no new requests any more.

        Returns when they have, or after `timeout` seconds: they go on from their last save then.
        """
        for runner in self._validating.values():
            runner.control.abandon()
        for runner in self._training.values():
            if self._engine.alive:
                runner.control.poke()
            else:  # there is nobody who could save
                runner.control.abandon()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout)
            if late:
                log.warning("%d fine-tuning jobs were not saved at the end of the drain", len(late))

    async def close(self) -> None:
        """Leave all jobs as they are."""
        self._closed = True
        for runner in (*self._validating.values(), *self._training.values()):
            runner.control.abandon()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def create(self, job: JobRecord, files: dict[str, Path]) -> JobRecord:
        """Keep a new job, and begin with it. Raises what `JobStore.add` raises."""
        await asyncio.to_thread(self.store.add, job, files)
        self.store.tell(job.id, JobEvent(job.created_at, "info", f"Created fine-tuning job: {job.id}"))
        self._fill()
        return self.store.find(job.id)

    @property
    def running(self) -> list[RunningJob]:
        """The jobs that train, and how far they are."""
        return [found for runner in self._training.values() if (found := runner.measured) is not None]

    def estimated_finish(self, job: JobRecord) -> int | None:
        """When a running job will have finished, in Unix time."""
        runner = self._training.get(job.id)
        return runner.estimated_finish if runner is not None and job.status == "running" else None

    # --- what clients ask for ----------------------------------------------------------------------------------------

    async def cancel(self, id_: str) -> JobRecord:
        """End a job; one that was cancelled stays so. Raises `BadRequest` if it has finished."""
        runner = self._runner(id_)
        now = int(self.store.clock())

        def change(job: JobRecord) -> JobRecord:
            if job.status != "cancelled":
                self._check_can_change(job, runner, "cancelled")
            return msgspec.structs.replace(job, status="cancelled", finished_at=job.finished_at or now)

        await self._changed(id_, change, "The job was cancelled")
        if (runner := self._runner(id_)) is not None:  # it may have ended meanwhile
            runner.control.abandon()
        else:
            await asyncio.to_thread(self.store.clean_up, id_)
        return self.store.find(id_)

    async def checkpoint(self, id_: str) -> tuple[int, CheckpointRecord]:
        """Make a checkpoint after the step that runs; returns it with its step.

        Raises `BadRequest` if the job does not train or stops before it, `Unavailable` if the server does.
        """
        job, runner = self.store.find(id_), self._training.get(id_)
        if runner is None or runner.publishing or job.status != "running":
            raise BadRequest(f"job {id_} is {job.status} and not in training: no checkpoint can be made of it now")
        made, ended = runner.control.ask_for_checkpoint(), asyncio.ensure_future(runner.ended.wait())
        either: set[asyncio.Future[Any]] = {made, ended}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if made.done():
            return made.result()
        if (status := self.store.find(id_).status) == "running":
            raise Unavailable("the server is about to end; ask again when the job goes on")
        raise BadRequest(f"job {id_} is {status}: it stopped before the checkpoint was made")

    async def pause(self, id_: str) -> JobRecord:
        """Let a job save and stop after its step. Raises `BadRequest` if it has finished."""
        runner = self._runner(id_)

        def change(job: JobRecord) -> JobRecord:
            self._check_can_change(job, runner, "paused")
            return msgspec.structs.replace(job, status="paused")

        await self._changed(id_, change, "The job was paused")
        if runner is not None and runner.control.waits_for_space:
            runner.control.abandon()  # it would go on by itself
        elif runner is not None:
            runner.control.poke()
        return self.store.find(id_)

    async def resume(self, id_: str) -> JobRecord:
        """Let a paused job go on; any other unfinished one does already. Raises `BadRequest` if it has finished."""
        runner = self._runner(id_)

        def change(job: JobRecord) -> JobRecord:
            if job.finished:
                raise _has_finished(job, "resumed")
            waits = runner is not None and runner.control.waits_for_space
            if job.status != "paused" or waits:
                return job
            return msgspec.structs.replace(job, status="validating_files" if job.numbers is None else "queued")

        await self._changed(id_, change, "The job was resumed")
        if runner is not None:
            runner.control.poke()
        self._fill()
        return self.store.find(id_)

    async def delete(self, id_: str) -> None:
        """Remove a finished job and its checkpoints. Raises `BadRequest` if it has not finished."""
        job = self.store.find(id_)
        if not job.finished:
            raise BadRequest(f"job {id_} has not finished: cancel it first", param="fine_tuning_job_id")
        if (runner := self._runner(id_)) is not None:
            await runner.ended.wait()
        await asyncio.to_thread(self.store.delete, id_)

    def _check_can_change(self, job: JobRecord, runner: JobRunner | None, how: str) -> None:
        if job.finished:
            raise _has_finished(job, how)
        if runner is not None and runner.publishing:
            raise BadRequest(f"job {job.id} is trained and being published: it cannot be {how} any more")

    async def _changed(self, id_: str, change: Any, message: str) -> None:
        """Change a job's record, in memory only if the disk is full, and tell if that made a difference."""
        told = False

        def change_and_tell(job: JobRecord) -> JobRecord:
            nonlocal told
            after: JobRecord = change(job)
            if after != job and not told:  # before it is seen: who waits for it reads the events then
                self.store.tell(id_, JobEvent(int(self.store.clock()), "info", message))
                told = True
            return after

        try:
            await asyncio.to_thread(self.store.update, id_, change_and_tell)
        except StorageFull:
            self.store.update(id_, change_and_tell, on_disk=False)

    @property
    def draining(self) -> bool:
        """Whether the server is about to end."""
        return self._closed or (self._engine.alive and not self._engine.ready)

    # --- what runs ---------------------------------------------------------------------------------------------------

    @property
    def _trains(self) -> bool:
        return self._engine.info is not None and self._engine.info.training_memory > 0

    def _runner(self, id_: str) -> JobRunner | None:
        self.store.find(id_)
        return self._training.get(id_) or self._validating.get(id_)

    def _fill(self) -> None:
        """Begin with as many jobs as may run; none where training is off."""
        if self._closed or not self._trains:
            return
        jobs = [job for job in self.store.list() if self._runner(job.id) is None]
        new = [job for job in jobs if job.status == "validating_files"]
        for job in new[: VALIDATED_AT_ONCE - len(self._validating)]:
            self._begin(job, self._validating)
        waiting = [job for job in jobs if job.status == "queued"]
        running = Counter(self.store.find(id_).tenant for id_ in self._training)
        for job in choose(waiting, running, self._most - len(self._training)):
            self._begin(job, self._training)

    def _begin(self, job: JobRecord, where: dict[str, JobRunner]) -> None:
        runner = JobRunner(self.store, job.id, self._engine, self._tokenizer, self._results, self._intervals)
        where[job.id] = runner
        task = asyncio.create_task(runner.run() if where is self._training else runner.prepare())
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            runner.ended.set()
            del where[job.id]
            if not self.draining:
                self._fill()

        task.add_done_callback(ended)


def choose(waiting: Iterable[JobRecord], running: Counter[str], most: int) -> list[JobRecord]:
    """Which jobs begin, out of those that wait, oldest first: always one of the key that has the fewest.

    Args:
        running: jobs by key.
        most: jobs to choose.
    """
    waiting, running = list(waiting), running.copy()
    chosen: list[JobRecord] = []
    while waiting and len(chosen) < most:
        job = min(waiting, key=lambda job: (running[job.tenant], job.id))
        waiting.remove(job)
        running[job.tenant] += 1
        chosen.append(job)
    return chosen


def _has_finished(job: JobRecord, how: str) -> BadRequest:
    ended = {"succeeded": "succeeded", "failed": "failed"}.get(job.status, "been cancelled")
    return BadRequest(f"job {job.id} has {ended} and cannot be {how}", param="fine_tuning_job_id")
