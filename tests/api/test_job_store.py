"""Fine-tuning jobs on disk: what a killed process, a full disk and damage leave."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from failing_disk import FailingDisk, Killed, QuickDisk

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.fine_tuning.job_events import BLOCK, EventLog
from lora_serve.api.fine_tuning.job_records import (
    CheckpointRecord,
    DataFile,
    Hyperparameters,
    JobEvent,
    JobRecord,
    Position,
    SaveRecord,
    TrainerSettings,
)
from lora_serve.api.fine_tuning.job_saves import ADAPTER, RUN, JobSaves
from lora_serve.api.fine_tuning.job_store import MOST_JOBS, MOST_UNFINISHED, TRAINING, JobStore, UnknownJob
from lora_serve.errors import BadRequest, ServeError, StorageFull, Unavailable
from lora_serve.training_messages import RunSettings


def store(root: Path, disk: Disk | None = None) -> JobStore:
    return JobStore(lambda: root / "jobs", disk=disk or QuickDisk())


def record(id_: str, tenant: str = "a") -> JobRecord:
    return JobRecord(
        id=id_, tenant=tenant, organization="a", created_at=1, model="base", adapter="x",
        training=DataFile("file-1", "0", "chat", 10), validation=None, method="supervised",
        hyperparameters=Hyperparameters(), settings=RunSettings(), trainer=TrainerSettings(), suffix="", seed=0,
        metadata=None,
    )  # fmt: skip


def add(store: JobStore, root: Path) -> JobRecord:
    (root / "data").write_text("data")
    job = record(store.new_id())
    store.add(job, {TRAINING: root / "data"})
    return job


def test_a_job_is_there_after_a_restart(tmp_path: Path) -> None:
    first = store(tmp_path)
    job = add(first, tmp_path)
    (tmp_path / "data").unlink()  # the file is deleted: the job keeps what it learns from
    changed = first.update(job.id, lambda job: msgspec.structs.replace(job, status="paused"))
    first.update(job.id, lambda job: msgspec.structs.replace(job, status="running"), on_disk=False)
    first.tell(job.id, JobEvent(1, "info", "hello"))
    again = store(tmp_path)
    assert again.list() == [changed]
    assert (again.folder(job) / TRAINING).read_text() == "data"
    assert [event.message for _, event in again.events(job.id).page(None, 10)[0]] == ["hello"]
    assert again.by_short_id(job.short_id) == changed
    for unknown in ("ftjob-1", "../x"):
        with pytest.raises(UnknownJob):
            again.find(unknown)


def test_an_unreadable_record_is_reported_and_the_others_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = store(tmp_path)
    jobs = [add(first, tmp_path) for _ in range(3)]
    (first.folder(jobs[0]) / "job.json").write_bytes(b'{"id"')
    (first.folder(jobs[1]) / "job.json").write_bytes((first.folder(jobs[2]) / "job.json").read_bytes())
    again = store(tmp_path)
    with caplog.at_level(logging.ERROR):
        assert again.list() == [jobs[2]]
    assert jobs[0].id in caplog.text
    assert jobs[1].id in caplog.text


def test_a_new_job_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    for at in range(40):
        root = tmp_path / str(at)
        root.mkdir()
        disk = FailingDisk(at, Killed)
        try:
            job = add(store(root, disk), root)
        except Killed:
            assert len(store(root).list()) <= 1
            assert not any((root / "jobs").glob("new-*"))
            continue
        assert store(root).list() == [job]
        return
    raise AssertionError("it never worked")


def test_a_job_whose_creation_fails_does_not_run_at_the_next_start(tmp_path: Path) -> None:
    for at in range(40):
        root = tmp_path / str(at)
        root.mkdir()
        disk = FailingDisk(at, lambda: OSError(errno.ENOSPC, "full"))
        failing = store(root, disk)
        try:
            add(failing, root)
        except StorageFull:
            assert store(root).list() == failing.list() == []
            continue
        assert store(root).list() == failing.list() != []
        if not disk.reached:
            return
    raise AssertionError("it never worked")


def test_a_file_that_is_deleted_while_its_job_is_made_is_named(tmp_path: Path) -> None:
    full = store(tmp_path)
    with pytest.raises(BadRequest) as refused:
        full.add(record(full.new_id()), {TRAINING: tmp_path / "gone"})
    assert refused.value.param == "training_file"
    assert list((tmp_path / "jobs").iterdir()) == []


@pytest.mark.parametrize("fault", [Killed, lambda: OSError(errno.EIO, "broken")])
def test_a_deleted_job_is_there_as_a_whole_or_not_at_all(tmp_path: Path, fault: Callable[[], BaseException]) -> None:
    for at in range(40):
        root = tmp_path / str(at)
        root.mkdir()
        job = add(store(root), root)
        disk = FailingDisk(at, fault)
        failing = store(root, disk)
        try:
            failing.delete(job.id)
        except (Killed, ServeError):
            assert store(root).list() in ([], [job])
            continue
        again = store(root)
        assert failing.list() == again.list() == []
        assert list((root / "jobs").iterdir()) == []
        with pytest.raises(UnknownJob):
            failing.delete(job.id)
        if not disk.reached:
            return
    raise AssertionError("it never worked")


def test_a_change_is_the_old_or_the_new_record(tmp_path: Path) -> None:
    for at in range(40):
        root = tmp_path / str(at)
        root.mkdir()
        job = add(store(root), root)
        disk = FailingDisk(at, lambda: OSError(errno.ENOSPC, "full"))
        failing = store(root, disk)
        try:
            failing.update(job.id, lambda job: msgspec.structs.replace(job, status="paused"))
        except StorageFull:
            assert failing.find(job.id) == store(root).find(job.id)  # what is shown is what the next start finds
            continue
        except ServeError:
            continue
        if disk.reached:
            continue
        assert store(root).find(job.id).status == "paused"
        return
    raise AssertionError("it never worked")


def test_a_key_may_have_so_many_unfinished_jobs(tmp_path: Path) -> None:
    full = store(tmp_path)
    full.open()
    (tmp_path / "data").write_text("data")
    for number in range(MOST_UNFINISHED):
        job = record(f"ftjob-{number:024x}")
        full._jobs[job.id] = job  # quicker than making folders
    with pytest.raises(BadRequest, match="1,000 jobs"):
        add(full, tmp_path)
    full.add(record(full.new_id(), tenant="b"), {TRAINING: tmp_path / "data"})
    for number in range(MOST_JOBS):
        job = msgspec.structs.replace(record(f"ftjob-{number:024x}"), status="failed")
        full._jobs[job.id] = job
    with pytest.raises(BadRequest, match="10,000 jobs; delete finished ones first"):
        add(full, tmp_path)


def test_nothing_works_while_the_folder_is_not_known() -> None:
    with pytest.raises(Unavailable):
        JobStore(lambda: None).list()


# --- events ----------------------------------------------------------------------------------------------------------


def test_events_are_read_in_pages_newest_first(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events", "ftjob-0123456789abcdef01234567")
    wanted = [f"{number} " + "x" * (number * 37 % 900) for number in range(200)]
    for message in wanted:
        log.add(JobEvent(1, "info", message))
    assert (tmp_path / "events").stat().st_size > 3 * BLOCK
    for limit in (1, 7, 199, 200, 300):
        found: list[str] = []
        after: str | None = None
        more = True
        while more:
            page, more = log.page(after, limit)
            assert len(page) <= limit
            found += [event.message for _, event in page]
            after = page[-1][0]
        assert found == wanted[::-1]
    assert log.page("ftevent-unknown", 5) == ([], False)


def test_events_are_read_from_one_on(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events", "ftjob-0123456789abcdef01234567")
    assert log.newer(None, 5) == []
    for number in range(30):
        log.add(JobEvent(1, "info", str(number)))
    everything = log.newer(None, 100)
    assert everything == log.page(None, 100)[0][::-1]
    for limit in (1, 7, 30):
        found: list[tuple[str, JobEvent]] = []
        while more := log.newer(found[-1][0] if found else None, limit):
            found += more
        assert found == everything
    last = everything[-1][0]
    inside, beyond = (f"{last[:-12]}{int(last[-12:], 16) + more:012x}" for more in (3, 5000))
    for unknown in ("ftevent-unknown", inside, beyond, f"{last[:-12]}-0", ""):
        assert log.newer(unknown, 100) == everything


def test_a_line_that_was_cut_short_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events"
    log = EventLog(path, "ftjob-0123456789abcdef01234567")
    for number in (1, 2):
        log.add(JobEvent(1, "info", "step", "metrics", {"step": number}))
    path.write_bytes(path.read_bytes()[:-5])
    again = EventLog(path, "ftjob-0123456789abcdef01234567")
    assert again.last_step() == 1
    again.add(JobEvent(1, "info", "step", "metrics", {"step": 3}))
    assert [event.data for event in again.metrics()] == [{"step": 1}, {"step": 3}]


def test_events_that_cannot_be_written_are_seen_and_written_later(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "events"
    log = EventLog(path, "ftjob-0123456789abcdef01234567")
    for message in "ab":
        log.add(JobEvent(1, "info", message))
    page, more = log.page(None, 1)
    assert ([event.message for _, event in page], more) == (["b"], True)
    assert [event.message for _, event in log.page(page[-1][0], 1)[0]] == ["a"]
    path.parent.mkdir()
    log.add(JobEvent(1, "info", "c"))
    again = EventLog(path, "ftjob-0123456789abcdef01234567")
    assert [event.message for _, event in again.page(None, 10)[0]] == ["c", "b", "a"]


# --- saves -----------------------------------------------------------------------------------------------------------


def save(saves: JobSaves, step: int, *, checkpoint: bool = True, best: int = 0) -> None:
    folder = saves.new_folder()
    for name in (RUN, ADAPTER) if checkpoint else (RUN,):
        (folder / name).mkdir()
    found = CheckpointRecord("ftckpt", 1, {}) if checkpoint else None
    saves.keep(folder, SaveRecord(Position(step=step), found), best)


def test_the_last_three_checkpoints_are_kept_and_the_best_one(tmp_path: Path) -> None:
    saves = JobSaves(tmp_path, QuickDisk())
    for step in range(1, 7):
        save(saves, 2 * step, best=4)
        save(saves, 2 * step + 1, checkpoint=False, best=4)
    again = JobSaves(tmp_path, QuickDisk())
    assert [step for step, _ in again.checkpoints()] == [4, 8, 10, 12]
    newest = again.newest()
    assert newest is not None
    assert newest[1].position.step == 13
    again.keep_adapters_only()
    assert again.newest() is None
    assert [step for step, _ in again.checkpoints()] == [4, 8, 10, 12]
    assert again.adapter(12) == tmp_path / "000000012" / ADAPTER
    assert again.adapter(13) is None


def test_a_save_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    for at in range(60):
        root = tmp_path / str(at)
        root.mkdir()
        save(JobSaves(root, QuickDisk()), 1, checkpoint=False)
        try:
            save(JobSaves(root, FailingDisk(at, Killed)), 2, checkpoint=False)
            killed = False
        except Killed:
            killed = True
        again = JobSaves(root, QuickDisk())
        newest = again.newest()
        assert newest is not None
        assert newest[1].position.step in (1, 2)
        assert (newest[0] / RUN).is_dir()
        if not killed:
            assert newest[1].position.step == 2
            return
    raise AssertionError("it never worked")
