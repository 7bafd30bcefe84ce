"""What a running job is told, waits for and tells: to stop, to make a checkpoint, space on the disk; events, status."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from lora_serve.api.fine_tuning.job_records import CheckpointRecord, JobEvent, JobRecord, Status
from lora_serve.api.fine_tuning.job_store import JobStore
from lora_serve.errors import ServeError, StorageFull
from lora_serve.messages import EngineInfo, Operation

Result = TypeVar("Result")


class TrainingEngine(Protocol):
    """What is needed of the engine."""

    @property
    def info(self) -> EngineInfo | None:
        """None until the engine was ready for the first time."""

    @property
    def alive(self) -> bool:
        """Whether the heartbeat is recent."""

    @property
    def ready(self) -> bool:
        """Whether it is alive and not draining."""

    @property
    def restarts(self) -> int:
        """Number of engine restarts."""

    async def call(self, operation: Operation) -> Any:
        """Run an operation; raises its `ServeError`."""


@dataclass(frozen=True)
class Intervals:
    """Seconds between saves besides those of epochs; until a full disk or memory, and the engine, are tried again."""

    save: float = 60.0
    retry: float = 5.0
    engine: float = 0.25


class Stopped(Exception):
    """The job is to be left as it is."""


class JobControl:
    """One running job, as those see it who run it.

    Attributes:
        waits_for_space: whether it is paused by itself until there is space on the disk.
    """

    def __init__(self, store: JobStore, id_: str, engine: TrainingEngine, intervals: Intervals) -> None:
        self.store, self.id, self.engine, self.intervals = store, id_, engine, intervals
        self.waits_for_space = False
        self._abandoned = asyncio.Event()
        self._poked = asyncio.Event()  # somebody thinks that waiting is over
        self._asked: asyncio.Future[tuple[int, CheckpointRecord]] | None = None

    @property
    def job(self) -> JobRecord:
        """The job's record as it is now."""
        return self.store.find(self.id)

    @property
    def draining(self) -> bool:
        """Whether the server is about to end."""
        return self.engine.alive and not self.engine.ready

    def abandon(self) -> None:
        """Let everything that waits raise `Stopped`."""
        self._abandoned.set()
        self._poked.set()

    def poke(self) -> None:
        """Let what waits try again now."""
        self._poked.set()

    def check(self) -> None:
        """Raise `Stopped` if the job was abandoned."""
        if self._abandoned.is_set():
            raise Stopped

    # --- checkpoints that are asked for -------------------------------------------------------------------------------

    @property
    def checkpoint_is_asked_for(self) -> bool:
        return self._asked is not None and not self._asked.done()

    def ask_for_checkpoint(self) -> asyncio.Future[tuple[int, CheckpointRecord]]:
        """The next checkpoint with its step, which several may wait for; none comes if the job ends before."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.get_running_loop().create_future()
        return self._asked

    def checkpoint_made(self, step: int, checkpoint: CheckpointRecord) -> None:
        """Tell those who wait for it."""
        if self._asked is not None and not self._asked.done():
            self._asked.set_result((step, checkpoint))

    # --- waiting -----------------------------------------------------------------------------------------------------

    async def call(self, operation: Operation) -> Any:
        """Call the engine. Raises `Stopped` as soon as the job is abandoned."""
        call = asyncio.ensure_future(self.engine.call(operation))
        abandoned = asyncio.ensure_future(self._abandoned.wait())
        try:
            await asyncio.wait({call, abandoned}, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            return call.result()
        finally:
            for each in (call, abandoned):
                each.cancel()
            await asyncio.gather(call, abandoned, return_exceptions=True)

    async def wait(self, seconds: float) -> None:
        """Wait so long, or until somebody pokes. Raises `Stopped`."""
        self._poked.clear()
        self.check()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._poked.wait(), seconds)
        self.check()

    async def wait_for_engine(self) -> None:
        """Wait until the engine takes operations again. Raises `Stopped` if it will not, or the job is paused."""
        while not self.engine.ready:
            if self.draining or self.job.status == "paused":
                raise Stopped
            await self.wait(self.intervals.engine)

    async def with_space(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do something, again and again while the disk is full; meanwhile the job is paused.

        It is not any more when that fails otherwise: nobody but the runner would let it go on.
        """
        while True:
            try:
                result = await work()
            except StorageFull as error:
                if self.draining:
                    raise Stopped from None
                if not self.waits_for_space:
                    self.waits_for_space = True
                    self._change_status("paused", ("running", "queued", "validating_files"), on_disk=False)
                    self.tell("warn", f"The job is paused: {error.message}; it goes on by itself when there is space")
                await self.wait(self.intervals.retry)
                continue
            except ServeError:
                self._go_on()
                raise
            if self._go_on():
                self.tell("info", "There is space on the disk again, and the job goes on")
            return result

    def _go_on(self) -> bool:
        """End the pause that a full disk began; whether there was one."""
        waited, self.waits_for_space = self.waits_for_space, False
        if waited:
            status: Status = "validating_files" if self.job.numbers is None else "queued"
            self._change_status(status, ("paused",), on_disk=False)
        return waited

    # --- telling -----------------------------------------------------------------------------------------------------

    def tell(self, level: Literal["info", "warn", "error"], message: str) -> None:
        """Add an event."""
        self.store.tell(self.id, JobEvent(int(self.store.clock()), level, message))

    async def update(self, change: Callable[[JobRecord], JobRecord]) -> None:
        """Change the record."""
        await asyncio.to_thread(self.store.update, self.id, change)

    async def begin(self) -> None:
        """Set the status to running, unless the job is paused or finished."""
        await self.with_space(lambda: asyncio.to_thread(self._change_status, "running", ("queued",), on_disk=True))

    def _change_status(self, status: Status, before: tuple[Status, ...], *, on_disk: bool) -> None:
        def change(job: JobRecord) -> JobRecord:
            return msgspec.structs.replace(job, status=status) if job.status in before else job

        self.store.update(self.id, change, on_disk=on_disk)
