"""What comes of a fine-tuning job: a published adapter with its training record, and a table of its steps."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.access_log import write_audit
from lora_serve.api.fine_tuning.file_store import CONTENT, FileStore
from lora_serve.api.fine_tuning.job_control import TrainingEngine
from lora_serve.api.fine_tuning.job_records import JobRecord
from lora_serve.api.fine_tuning.job_store import JobStore, disk_errors
from lora_serve.api.fine_tuning.peft_options import shown_settings
from lora_serve.api.request_record import Change
from lora_serve.api.upload import staging_folder
from lora_serve.errors import ServeError, StorageFull
from lora_serve.messages import AdapterInfo, Publish
from lora_serve.names import CARD

PURPOSE = "fine-tune-results"
# OpenAI's columns → our metrics, of tokens or of preferences.
COLUMNS = {
    "step": ("step",),
    "train_loss": ("train_loss",),
    "train_accuracy": ("train_mean_token_accuracy", "train_rewards_accuracy"),
    "valid_loss": ("valid_loss",),
    "valid_mean_token_accuracy": ("valid_mean_token_accuracy",),
}

log = logging.getLogger(__name__)


class JobResults:
    """Publishes adapters of jobs, and keeps their tables as files.

    Args:
        staging: folder on the store's file system; raises Unavailable while there is none.
    """

    def __init__(self, store: JobStore, engine: TrainingEngine, files: FileStore, staging: Callable[[], Path]) -> None:
        self._store, self._engine, self._files, self._staging = store, engine, files, staging

    async def publish(self, job: JobRecord, step: int, name: str | None = None) -> str:
        """Publish a checkpoint's adapter, under the job's name for it or another one. Returns the version's digest."""
        checkpoint = self._store.saves(job.id).adapter(step)
        if checkpoint is None:
            raise ServeError(f"the checkpoint of step {step} is missing on the server's disk")
        record = training_record(self._store, job, step)
        async with staging_folder(self._staging()) as root:
            with disk_errors():
                folder = root / "adapter"
                await asyncio.to_thread(shutil.copytree, checkpoint, folder)
                await asyncio.to_thread((folder / CARD).write_text, _card(job, record), "utf-8")
            operation = Publish(name or job.adapter, str(folder), replace=True)
            info = msgspec.convert(await self._engine.call(operation), AdapterInfo)
        digest = info.versions[0].digest
        write_audit(Change("publish", info.name, digest), key=job.organization, source=job.id)
        return digest

    async def keep_metrics(self, job: JobRecord) -> list[str]:
        """Keep the table of a job's steps as a file of its key. Returns the file's id; none if the key has too many."""
        async with staging_folder(self._staging()) as root:
            try:
                return [await asyncio.to_thread(self._write_table, job, root / "file")]
            except StorageFull:
                raise
            except ServeError as error:
                log.warning("the results of job %s are not kept: %s", job.id, error.message)
                return []

    def _write_table(self, job: JobRecord, folder: Path) -> str:
        written = io.StringIO()
        table = csv.writer(written, lineterminator="\n")
        table.writerow(COLUMNS)
        for event in self._store.events(job.id).metrics():
            data = event.data or {}
            table.writerow([next((data[name] for name in names if name in data), "") for names in COLUMNS.values()])
        content = written.getvalue().encode()
        with disk_errors():
            folder.mkdir()
            Disk().write(folder / CONTENT, content)
        digest = hashlib.sha256(content).hexdigest()
        return self._files.add(
            folder, tenant=job.tenant, filename="step_metrics.csv", purpose=PURPOSE, sha256=digest
        ).id


def training_record(store: JobStore, job: JobRecord, step: int) -> dict[str, object]:
    """What a version was trained on and how: digests of the data, settings, losses."""
    found = dict(store.saves(job.id).checkpoints()).get(step)
    checkpoint = None if found is None else found.checkpoint
    return {
        "job": job.id,
        "model": job.model,
        "method": job.method,
        "training_data": msgspec.to_builtins(job.training),
        "validation_data": msgspec.to_builtins(job.validation),
        "seed": job.seed,
        "max_length": job.max_length,
        "hyperparameters": msgspec.to_builtins(job.numbers),
        "peft": shown_settings(job.settings),
        "trainer": msgspec.to_builtins(job.trainer),
        "metrics": {"step": step} if checkpoint is None else checkpoint.metrics,
    }


def _card(job: JobRecord, record: dict[str, object]) -> str:
    """A model card. JSON strings are YAML's as well."""
    return (
        f"---\nbase_model: {json.dumps(job.model)}\nlibrary_name: peft\n---\n\n"
        f"A {job.settings.peft_type} adapter, trained by lora-serve in fine-tuning job {job.id}:\n\n"
        f"```json\n{json.dumps(record, indent=2)}\n```\n"
    )
