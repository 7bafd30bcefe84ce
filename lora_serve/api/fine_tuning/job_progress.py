"""What a job makes of the steps of its loop: events, saves to go on from, checkpoints."""

from __future__ import annotations

import asyncio
import time

from lora_serve.api.fine_tuning.job_control import JobControl, Stopped
from lora_serve.api.fine_tuning.job_records import CheckpointRecord, JobEvent, Position, SaveRecord
from lora_serve.api.fine_tuning.job_saves import ADAPTER, RUN
from lora_serve.api.fine_tuning.job_store import disk_errors
from lora_serve.api.fine_tuning.training_loop import Metrics
from lora_serve.job_metrics import RunningJob
from lora_serve.training_messages import ExportRun, SaveRun

IN_CHECKPOINTS = ("step", "train_", "valid_", "full_valid_")  # how metrics begin that checkpoints have


class JobProgress:
    """The `LoopProgress` of a job's loop that begins at a position.

    Args:
        told: step of the last metrics event, which may be of a loop that went further and was lost.
    """

    def __init__(self, control: JobControl, position: Position, told: int) -> None:
        self._control, self._told = control, told
        self._saved = position.step
        self._saved_at = self._began_at = time.monotonic()
        self._first = self._last = position.step
        self._tokens = position.tokens
        self._losses: Metrics = {}  # the last ones
        self._unsaved: Metrics | None = None  # of the last step, unless there is a checkpoint of it

    @property
    def estimated_finish(self) -> int | None:
        """Unix time in seconds; None if nothing is known yet."""
        steps = self._control.job.steps
        if steps is None or self._last == self._first:
            return None
        each = (time.monotonic() - self._began_at) / (self._last - self._first)
        return int(self._control.store.clock() + each * (steps - self._last))

    @property
    def measured(self) -> RunningJob:
        """How far the job is."""
        job = self._control.job
        losses = self._losses.get("train_loss"), self._losses.get("valid_loss")
        return RunningJob(job.id, job.adapter, self._last, job.steps or 0, self._tokens, *losses)

    async def before_step(self, position: Position) -> None:
        """Save if it is time, or a checkpoint was asked for. Raises `Stopped` if the job pauses, or the server ends."""
        self._control.check()
        if self._control.checkpoint_is_asked_for and self._unsaved is not None:
            await self._save(position, self._unsaved)
        status = self._control.job.status
        if status == "paused" or self._control.draining:
            await self._save(position, None)
            raise Stopped
        if status == "queued":  # paused, and resumed before that was noticed
            await self._control.begin()
        if time.monotonic() - self._saved_at >= self._control.intervals.save:
            await self._save(position, None)

    async def stepped(self, position: Position, metrics: Metrics) -> None:
        """Add the metrics event of a step, unless there is one from before the job went on from a save."""
        self._last, self._unsaved, self._tokens = position.step, metrics, position.tokens
        self._losses |= {name: metrics[name] for name in ("train_loss", "valid_loss") if name in metrics}
        if position.step <= self._told:
            return
        self._told = position.step
        message = f"Step {position.step}/{self._control.job.steps}: training loss={metrics['train_loss']:.4f}"
        if "valid_loss" in metrics:
            message += f", validation loss={metrics['valid_loss']:.4f}"
        event = JobEvent(int(self._control.store.clock()), "info", message, "metrics", metrics)
        await asyncio.to_thread(self._control.store.tell, self._control.id, event)

    async def epoch_ended(self, position: Position, metrics: Metrics) -> None:
        """Make a checkpoint."""
        await self._save(position, metrics)

    async def _save(self, position: Position, metrics: Metrics | None) -> None:
        """Save the run, as a checkpoint if there are metrics."""
        if metrics is None and self._saved == position.step:
            return
        control = self._control
        saves = control.store.saves(control.id)
        checkpoint: CheckpointRecord | None = None
        if metrics is not None:
            id_ = f"ftckpt-{control.job.short_id}{position.step:09d}"
            kept = {name: metrics[name] for name in metrics if name.startswith(IN_CHECKPOINTS)}
            checkpoint = CheckpointRecord(id_, int(control.store.clock()), kept)

        async def save() -> None:
            with disk_errors():
                folder = await asyncio.to_thread(saves.new_folder)
                try:
                    await control.call(SaveRun(control.id, str(folder / RUN)))
                    if checkpoint is not None:
                        await control.call(ExportRun(control.id, str(folder / ADAPTER)))
                    await asyncio.to_thread(saves.keep, folder, SaveRecord(position, checkpoint), position.best_step)
                except BaseException:
                    await asyncio.to_thread(saves.discard, folder)
                    raise

        await control.with_space(save)
        self._saved, self._saved_at = position.step, time.monotonic()
        if checkpoint is not None:
            self._unsaved = None
            control.checkpoint_made(position.step, checkpoint)
