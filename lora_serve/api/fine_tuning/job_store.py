"""Fine-tuning jobs on disk, in the adapter store's folder, each in a folder of its own.

fine-tuning-jobs/<id>/job.json      its record, replaced by one rename
fine-tuning-jobs/<id>/training      the file it learns from: a hard link, which lasts if the file is deleted
fine-tuning-jobs/<id>/validation    likewise, if it has one
fine-tuning-jobs/<id>/events        what happened to it (`job_events.py`)
fine-tuning-jobs/<id>/saves/        saved runs and checkpoints (`job_saves.py`)
fine-tuning-jobs/<id>/encoded…      encoded data (`encoded_data.py`), until it has finished

A job appears by one rename of a complete folder. Ids begin with the time, so their order is that of the jobs.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import msgspec

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.fine_tuning.job_events import EventLog
from lora_serve.api.fine_tuning.job_records import JobEvent, JobRecord, Status
from lora_serve.api.fine_tuning.job_saves import JobSaves
from lora_serve.errors import BadRequest, ServeError, StorageFull, StoreUnusable, Unavailable

RECORD, TRAINING, VALIDATION, EVENTS, SAVES = "job.json", "training", "validation", "events", "saves"
ENCODED = {TRAINING: "encoded-training", VALIDATION: "encoded-validation"}
ID = re.compile(r"ftjob-[0-9a-f]{24}")
NEW = "new-"  # how folders begin that are not complete
MOST_UNFINISHED, MOST_JOBS = 1000, 10_000  # of one key; the others are finished

log = logging.getLogger(__name__)


class UnknownJob(ServeError):
    """There is no such job, or it is another key's."""

    kind = "job_not_found"


class JobStore:
    """The jobs of all tenants. Methods wait for the disk; they may be called by several threads.

    Args:
        root: returns the folder, which is made if need be; None while it is not known.
        clock: Unix time in seconds.

    Raises: methods that change something `StorageFull` if the disk is full, `StoreUnusable` if it cannot be written;
        all `Unavailable` while the folder is not known.
    """

    def __init__(
        self, root: Callable[[], Path | None], clock: Callable[[], float] = time.time, disk: Disk | None = None
    ) -> None:
        self._root, self.clock = root, clock
        self.disk = disk or Disk()
        self._lock = threading.RLock()
        self._opened = False
        self._jobs: dict[str, JobRecord] = {}
        self._by_short_id: dict[str, str] = {}
        self._events: dict[str, EventLog] = {}
        self._saves: dict[str, JobSaves] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._jobs)} jobs>"

    def open(self) -> None:
        """Read the records, and remove what was interrupted. Done once; other methods do it if need be."""
        with self._lock:
            if self._opened:
                return
            folder = self._folder()
            with disk_errors():
                self.disk.make_folder(folder)
                for path in sorted(folder.iterdir()):
                    if path.name.startswith(NEW):
                        self.disk.remove(path)
                    elif ID.fullmatch(path.name) and not path.is_symlink():
                        self._open_job(path)
            self._opened = True

    def list(self) -> list[JobRecord]:
        """All jobs, oldest first."""
        self._ensure_open()
        return sorted([*self._jobs.values()], key=lambda job: job.id)

    def find(self, id_: str) -> JobRecord:
        """A job. Raises `UnknownJob`."""
        self._ensure_open()
        if id_ not in self._jobs:
            raise unknown_job(id_)
        return self._jobs[id_]

    def by_short_id(self, short_id: str) -> JobRecord | None:
        """The job whose id ends like this."""
        self._ensure_open()
        found = self._by_short_id.get(short_id)
        return None if found is None else self._jobs[found]

    def new_id(self) -> str:
        """An id for a job that begins now."""
        return f"ftjob-{int(self.clock() * 1e6):014x}{secrets.token_hex(5)}"

    def add(self, job: JobRecord, files: dict[str, Path]) -> None:
        """Keep a new job. Raises `BadRequest` if its key has too many, or a file was deleted meanwhile.

        Args:
            files: content of `TRAINING` and perhaps `VALIDATION`, on the same file system.
        """
        with self._lock:
            self.open()
            own = [each for each in self._jobs.values() if each.tenant == job.tenant]
            if sum(not each.finished for each in own) >= MOST_UNFINISHED:
                raise BadRequest(f"a key may have {MOST_UNFINISHED:,} jobs that are not finished; cancel others first")
            if len(own) >= MOST_JOBS:
                raise BadRequest(f"a key may have {MOST_JOBS:,} jobs; delete finished ones first")
            folder = self._folder()
            new = folder / (NEW + job.id)
            with disk_errors():
                try:
                    self.disk.make_folder(new / SAVES)
                    for name, path in files.items():
                        self._link(path, new / name)
                    self.disk.write(new / RECORD, msgspec.json.encode(job))
                    self.disk.sync(new)
                    self.disk.move(new, folder / job.id)
                except BaseException:
                    self.disk.remove(new)
                    raise
            self._keep(job)  # it is there, whatever happens now
            try:
                self.disk.sync(folder)
            except OSError as error:
                log.error("job %s is kept and may be lost if the machine stops now: %s", job.id, error)

    def update(self, id_: str, change: Callable[[JobRecord], JobRecord], *, on_disk: bool = True) -> JobRecord:
        """Change a job's record as it is now; returns the new one.

        Args:
            on_disk: otherwise the change is lost with the process, or written with the next one.
        """
        with self._lock:
            job = change(self.find(id_))
            if on_disk:
                folder = self.folder(job)
                with disk_errors():
                    new = folder / (NEW + RECORD)
                    self.disk.remove(new)
                    self.disk.write(new, msgspec.json.encode(job))
                    self.disk.move(new, folder / RECORD)
                    self._jobs[id_] = job  # as on disk, even if that is not certain to last
                    self.disk.sync(folder)
            self._jobs[id_] = job
            return job

    def delete(self, id_: str) -> None:
        """Remove a job with all that was kept of it. Raises `UnknownJob`."""
        with self._lock:
            job = self.find(id_)
            folder = self._folder()
            old = folder / (NEW + id_)  # which the next start removes, if it is not removed now
            with disk_errors():
                self.disk.remove(old)
                self.disk.move(folder / id_, old)
                for kept in (self._jobs, self._events, self._saves):
                    del kept[id_]
                self._by_short_id.pop(job.short_id, None)
                self.disk.sync(folder)
        try:
            self.disk.remove(old)
        except OSError as error:
            log.error("what is left of job %s cannot be removed now: %s", id_, error)

    def count_by_status(self) -> dict[str, int]:
        """How many jobs there are; none before the records are read."""
        counts = Counter(job.status for job in [*self._jobs.values()])
        return {status: counts[status] for status in get_args(Status)}

    def tell(self, id_: str, event: JobEvent) -> None:
        """Add an event. If it cannot be written now, it is with the next one."""
        self.events(id_).add(event)

    def events(self, id_: str) -> EventLog:
        """The events of a job. Raises `UnknownJob`."""
        self.find(id_)
        return self._events[id_]

    def saves(self, id_: str) -> JobSaves:
        """What was saved of a job. Raises `UnknownJob`."""
        self.find(id_)
        return self._saves[id_]

    def folder(self, job: JobRecord) -> Path:
        """The folder of a job."""
        return self._folder() / job.id

    def clean_up(self, id_: str) -> None:
        """Remove what a finished job does not need any more; its checkpoints stay.

        Its record is written once more: if the disk was full when it finished, it is not there yet.
        """
        job, saves = self.find(id_), self.saves(id_)
        try:
            for name in (TRAINING, VALIDATION, *ENCODED.values()):
                self.disk.remove(self.folder(job) / name)
            saves.keep_adapters_only()
        except OSError as error:
            log.error("what job %s does not need any more cannot be removed: %s", id_, error)
        try:
            self.update(id_, lambda job: job)
        except ServeError as error:
            log.error("the record of job %s cannot be written: %s", id_, error.message)

    # --- on disk -----------------------------------------------------------------------------------------------------

    def _link(self, path: Path, target: Path) -> None:
        try:
            self.disk.link(path, target)
        except FileNotFoundError:
            raise BadRequest("a file was deleted while the job was made", param=f"{target.name}_file") from None

    def _ensure_open(self) -> None:
        """Open if need be. What only reads does not wait for the lock, which others hold while they write."""
        if not self._opened:
            self.open()

    def _folder(self) -> Path:
        root = self._root()
        if root is None:
            raise Unavailable("the server is starting", retry_after=5)
        return root

    def _open_job(self, path: Path) -> None:
        try:
            job = msgspec.json.decode((path / RECORD).read_bytes(), type=JobRecord)
        except (OSError, ValueError) as error:
            log.error("%s of %s cannot be read; the job is left alone: %s", RECORD, path, error)
            return
        if job.id != path.name:
            log.error("%s of %s is of another job and is left alone", RECORD, path)
            return
        self._keep(job)

    def _keep(self, job: JobRecord) -> None:
        folder = self._folder() / job.id
        self._jobs[job.id] = job
        self._by_short_id[job.short_id] = job.id
        self._events[job.id] = EventLog(folder / EVENTS, job.id)
        self._saves[job.id] = JobSaves(folder / SAVES, self.disk)


def unknown_job(id_: str) -> UnknownJob:
    """The error for a job that does not exist or that the caller may not see; both look the same."""
    return UnknownJob(f"fine-tuning job {id_[:100]} does not exist", param="fine_tuning_job_id")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise `StorageFull` or `StoreUnusable` for an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in StorageFull.errnos:
            raise StorageFull("the disk for fine-tuning jobs is full") from error
        raise StoreUnusable(f"jobs cannot be read or written at the moment: {error.strerror or error}") from error
