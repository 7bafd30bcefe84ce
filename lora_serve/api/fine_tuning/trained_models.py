"""Names of fine-tuned models, `ft:<base>:<organization>:<suffix>:<id>`, and the adapters that they stand for.

A checkpoint, `ft:…:ckpt-step-<n>`, is published as an adapter when it is first asked for.
"""

from __future__ import annotations

import asyncio
import re

from lora_serve.api.caller import Caller
from lora_serve.api.fine_tuning.job_control import TrainingEngine
from lora_serve.api.fine_tuning.job_records import JobRecord
from lora_serve.api.fine_tuning.job_results import JobResults
from lora_serve.api.fine_tuning.job_store import JobStore
from lora_serve.errors import AdapterNotFound
from lora_serve.messages import DescribeAdapter

PREFIX = "ft:"
LONGEST_STEM = 40  # characters of an adapter's name before the job's id
_NAME = re.compile(r"ft:.*:(?P<id>[0-9a-f]{10})(?P<checkpoint>:ckpt-step-(?P<step>[1-9][0-9]{0,8}))?", re.DOTALL)


class TrainedModels:
    """Fine-tuned models and their checkpoints, by name."""

    def __init__(self, store: JobStore, engine: TrainingEngine, results: JobResults) -> None:
        self._store, self._engine, self._results = store, engine, results
        self._publishing = asyncio.Lock()

    def adapter(self, model: str) -> str | None:
        """The adapter that a model's name stands for, as `adapter` in a body; None if it is no fine-tuned model."""
        found = self._find(model)
        if found is None:
            return None
        job, step = found
        if step is not None:
            return checkpoint_adapter(job, step)
        return None if job.digest is None else f"{job.adapter}@{job.digest}"

    async def publish_checkpoint(self, model: str | None, caller: Caller) -> None:
        """Publish the checkpoint that a model's name stands for, if it is one and not published yet."""
        if model is None or not model.startswith(PREFIX):
            return
        found = await asyncio.to_thread(self._find, model)  # it may read the records
        if found is None:
            return
        job, step = found
        if step is None:
            return
        name = checkpoint_adapter(job, step)
        saves = self._store.saves(job.id)
        if not caller.may_use(name) or await asyncio.to_thread(saves.adapter, step) is None or await self._exists(name):
            return
        async with self._publishing:
            if not await self._exists(name):
                await self._results.publish(job, step, name)

    async def _exists(self, adapter: str) -> bool:
        try:
            await self._engine.call(DescribeAdapter(adapter))
        except AdapterNotFound:
            return False
        return True

    def _find(self, model: str) -> tuple[JobRecord, int | None] | None:
        if not model.startswith(PREFIX) or (match := _NAME.fullmatch(model)) is None:
            return None
        job = self._store.by_short_id(match["id"])
        if job is None or model.removesuffix(match["checkpoint"] or "") != job.model_name:
            return None
        return job, None if match["step"] is None else int(match["step"])


def result_adapter(suffix: str, short_id: str) -> str:
    """The name of the adapter that a job makes, if none was asked for: like its suffix, and no other job's."""
    return f"{_stem(suffix)}-{short_id}"


def checkpoint_adapter(job: JobRecord, step: int) -> str:
    """The name of the adapter that a checkpoint is published as."""
    stem = job.adapter.removesuffix(f"-{job.short_id}")
    return f"{_stem(stem)}-{job.short_id}-step-{step}"


def _stem(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:LONGEST_STEM].rstrip("-._") or "ft"
