"""Fine-tuning jobs over a fake engine: what they do, in which order, and that what is lost changes nothing."""

from __future__ import annotations

import asyncio
import errno
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from failing_disk import QuickDisk
from fake_training import COMPLETIONS, PREFERENCES, Jobs, when

from lora_serve.api.fine_tuning.job_control import Intervals
from lora_serve.api.fine_tuning.job_queue import choose
from lora_serve.api.fine_tuning.job_records import CheckpointRecord, TrainerSettings
from lora_serve.api.fine_tuning.job_saves import RUN
from lora_serve.api.fine_tuning.job_store import TRAINING
from lora_serve.errors import BadRequest, Unavailable
from lora_serve.training_messages import CreateRun, ExportRun, ForwardBackward, OptimizerStep, SaveRun

STEPS = list(range(1, 10))


class FullDisk(QuickDisk):
    """Refuses to write while it is full."""

    def __init__(self) -> None:
        self.full = False

    def write(self, path: Path, data: bytes) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "no space")
        super().write(path, data)

    def make_folder(self, path: Path) -> None:
        if self.full and not path.exists():
            raise OSError(errno.ENOSPC, "no space")
        super().make_folder(path)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path, disk=QuickDisk())


async def undisturbed(root: Path, **given: Any) -> str:
    """The weights of a job to which nothing happens."""
    jobs = Jobs(root / "undisturbed", disk=QuickDisk())
    await jobs.end(await jobs.create(**given))
    return jobs.result


async def test_a_job_runs_from_its_files_to_a_published_adapter(jobs: Jobs) -> None:
    id_ = await jobs.create(validation=COMPLETIONS[:10])
    assert jobs.store.find(id_).status == "validating_files"
    job = await jobs.end(id_)
    assert (job.status, job.error, job.steps) == ("succeeded", None, 9)
    assert job.digest == "digest0"
    assert jobs.steps(id_) == STEPS
    assert [step for step, _ in jobs.store.saves(id_).checkpoints()] == [3, 6, 9]
    files = jobs.engine.published[-1]
    assert b'"training_data"' in files["README.md"]
    (result,) = job.result_files
    table = jobs.files.path(jobs.files.find(result, "")).read_text().splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [row.split(",")[0] for row in table[1:]] == [str(step) for step in STEPS]
    assert [float(row.split(",")[1]) for row in table[1:]] == pytest.approx([0.5] * 9)
    assert [row.split(",")[2:] for row in table[1:4]] == [["1.0", "", ""], ["1.0", "", ""], ["1.0", "1.0", "1.0"]]
    assert jobs.engine.runs == {}
    assert sorted(path.name for path in jobs.store.folder(job).iterdir()) == ["events", "job.json", "saves"]
    assert not (jobs.store.saves(id_).folder(9) / RUN).exists()


async def test_each_epoch_has_every_example_once_and_in_another_order(jobs: Jobs) -> None:
    await jobs.end(await jobs.create())
    batches = [each.examples for each in jobs.engine.trained if isinstance(each, ForwardBackward)]
    epochs = [
        [tuple(example.tokens) for batch in batches[start : start + 3] for example in batch] for start in (0, 3, 6)
    ]
    assert len(set(epochs[0])) == 12
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    for batch in batches:  # a mean over the tokens that are learnt
        assert sum(weight for each in batch for weight in each.inputs["weights"]) == pytest.approx(1.0)


async def test_preferences_have_the_base_s_log_probabilities(jobs: Jobs) -> None:
    id_ = await jobs.create(PREFERENCES, kind="preference", method="dpo", validation=PREFERENCES[:10])
    job = await jobs.end(id_)
    assert job.error is None
    passes = [each for each in jobs.engine.trained if isinstance(each, ForwardBackward)]
    learnt = [each for each in passes if not each.forward_only]
    assert {(each.loss, each.config["beta"], len(each.examples)) for each in learnt} == {("dpo", 0.1, 8)}
    for example in learnt[-1].examples:  # at the time of the last step the run itself would say -0.25
        assert example.inputs["logprobs"] == [-0.5 * weight for weight in example.inputs["weights"]]
    steps = [each for each in jobs.engine.trained if isinstance(each, OptimizerStep)]
    assert {(each.eps, each.max_grad_norm) for each in steps} == {(4e-8, 4.0)}  # the gradient is a sum over 4 pairs
    table = jobs.files.path(jobs.files.find(job.result_files[0], "")).read_text().splitlines()
    assert [row.split(",")[2] for row in table[1:]] == ["0.5"] * 9


@pytest.mark.parametrize(
    ("kind", "number"),
    [(CreateRun, 1), *((kind, number) for kind in (ForwardBackward, OptimizerStep, SaveRun) for number in (1, 2))],
)
async def test_a_lost_engine_changes_nothing_in_the_result(jobs: Jobs, tmp_path: Path, kind: type, number: int) -> None:
    when(jobs.engine, kind, number, jobs.engine.die)
    id_ = await jobs.create()
    assert (await jobs.end(id_)).status == "succeeded"
    assert jobs.result == await undisturbed(tmp_path)
    assert jobs.steps(id_) == STEPS  # each once
    assert any("The engine was lost" in message for message in jobs.messages(id_))


@pytest.mark.parametrize("step", [1, 5, 9])
async def test_a_server_that_ends_changes_nothing_in_the_result(jobs: Jobs, tmp_path: Path, step: int) -> None:
    reached = asyncio.Event()
    when(jobs.engine, OptimizerStep, step, reached.set)
    id_ = await jobs.create()
    await reached.wait()
    await jobs.queue.close()  # as a killed process, it writes nothing more
    again = Jobs(tmp_path, disk=QuickDisk())
    await again.queue.start()
    assert (await again.end(id_)).status == "succeeded"
    assert again.result == await undisturbed(tmp_path)
    assert again.steps(id_) == STEPS


async def test_jobs_wait_while_training_is_off(jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    id_ = await jobs.create()
    await jobs.until(id_, "running")
    await jobs.queue.close()
    off = Jobs(tmp_path, disk=QuickDisk())
    assert off.engine.info is not None
    off.engine.info = msgspec.structs.replace(off.engine.info, training_memory=0)
    await off.queue.start()
    await asyncio.sleep(0.05)
    assert off.store.find(id_).status == "queued"
    assert off.engine.trained == []
    assert "1 fine-tuning jobs wait" in caplog.text


async def test_a_preference_job_goes_on_with_the_reference_of_the_base(jobs: Jobs, tmp_path: Path) -> None:
    given: dict[str, Any] = {"lines": PREFERENCES, "kind": "preference", "method": "dpo"}
    when(jobs.engine, OptimizerStep, 5, jobs.engine.die)
    assert (await jobs.end(await jobs.create(**given))).status == "succeeded"
    assert jobs.result == await undisturbed(tmp_path, **given)


async def test_a_reference_that_was_lost_is_computed_of_the_base_again(jobs: Jobs, tmp_path: Path) -> None:
    given: dict[str, Any] = {"lines": PREFERENCES, "kind": "preference", "method": "dpo"}

    def lose() -> None:
        (jobs.store.folder(jobs.store.find(id_)) / "encoded-training" / "reference").unlink()
        jobs.engine.die()

    when(jobs.engine, OptimizerStep, 5, lose)
    id_ = await jobs.create(**given)
    assert (await jobs.end(id_)).status == "succeeded"
    assert jobs.result == await undisturbed(tmp_path, **given)


@pytest.mark.parametrize("step", [1, 4, 8])
async def test_a_paused_job_goes_on_where_it_was(jobs: Jobs, tmp_path: Path, step: int) -> None:
    when(jobs.engine, OptimizerStep, step, lambda: jobs.queue.pause(id_))
    id_ = await jobs.create()
    await jobs.until(id_, "paused")
    while jobs.engine.runs:
        await asyncio.sleep(0.001)
    assert jobs.steps(id_) == STEPS[:step]
    before = len([each for each in jobs.engine.trained if isinstance(each, OptimizerStep)])
    assert before == step  # saved at once: nothing is computed twice
    await jobs.queue.resume(id_)
    assert (await jobs.end(id_)).status == "succeeded"
    assert jobs.result == await undisturbed(tmp_path)
    assert len([each for each in jobs.engine.trained if isinstance(each, OptimizerStep)]) == 9


async def test_a_job_that_is_paused_and_resumed_at_once_goes_on(jobs: Jobs) -> None:
    async def both() -> None:
        await jobs.queue.pause(id_)
        await jobs.queue.resume(id_)

    when(jobs.engine, ForwardBackward, 5, both)
    id_ = await jobs.create()
    assert (await jobs.end(id_)).status == "succeeded"
    assert jobs.steps(id_) == STEPS


@pytest.mark.parametrize("step", [1, 4])
async def test_a_checkpoint_is_made_when_it_is_asked_for(jobs: Jobs, tmp_path: Path, step: int) -> None:
    asked: list[asyncio.Task[tuple[int, CheckpointRecord]]] = []
    when(jobs.engine, OptimizerStep, step, lambda: asked.extend(asyncio.create_task(ask()) for ask in [make] * 2))

    async def make() -> tuple[int, CheckpointRecord]:
        return await jobs.queue.checkpoint(id_)

    id_ = await jobs.create()
    assert (await jobs.end(id_)).status == "succeeded"
    (made, again) = [await each for each in asked]
    assert made == again
    assert made[0] in (step, step + 1)  # the step may have ended before it was asked
    assert made[1].metrics["step"] == made[0]
    assert jobs.result == await undisturbed(tmp_path)
    checkpoints = [each for each, _ in jobs.store.saves(id_).checkpoints()]
    assert checkpoints == sorted({made[0], 3, 6, 9})[-3:]
    exported = [each for each in jobs.engine.trained if isinstance(each, ExportRun)]
    assert len(exported) == 4  # one for both who asked
    with pytest.raises(BadRequest, match="succeeded and not in training"):
        await jobs.queue.checkpoint(id_)


async def test_who_asked_for_a_checkpoint_is_told_if_the_job_stops_before(jobs: Jobs) -> None:
    asked: list[asyncio.Task[tuple[int, CheckpointRecord]]] = []

    async def ask_and_cancel() -> None:
        asked.append(asyncio.create_task(jobs.queue.checkpoint(id_)))
        await asyncio.sleep(0)
        await jobs.queue.cancel(id_)

    when(jobs.engine, ForwardBackward, 2, ask_and_cancel)
    id_ = await jobs.create()
    await jobs.end(id_)
    with pytest.raises(BadRequest, match="is cancelled: it stopped before"):
        await asked[0]


async def test_who_asked_for_a_checkpoint_is_told_if_the_server_ends_before(jobs: Jobs) -> None:
    asked: list[asyncio.Task[tuple[int, CheckpointRecord]]] = []

    async def ask_and_end() -> None:
        asked.append(asyncio.create_task(jobs.queue.checkpoint(id_)))
        await asyncio.sleep(0)
        closing.append(asyncio.create_task(jobs.queue.close()))
        await asyncio.sleep(0)

    closing: list[asyncio.Task[None]] = []
    when(jobs.engine, ForwardBackward, 2, ask_and_end)
    id_ = await jobs.create()
    while not asked:
        await asyncio.sleep(0.002)
    with pytest.raises(Unavailable, match="about to end"):
        await asked[0]
    await closing[0]


async def test_a_checkpoint_survives_a_lost_engine_that_was_asked_for_before(jobs: Jobs, tmp_path: Path) -> None:
    asked: list[asyncio.Task[tuple[int, CheckpointRecord]]] = []

    def ask_and_die() -> None:
        asked.append(asyncio.create_task(jobs.queue.checkpoint(id_)))
        jobs.engine.die()

    when(jobs.engine, ForwardBackward, 5, ask_and_die)
    id_ = await jobs.create()
    assert (await jobs.end(id_)).status == "succeeded"
    assert (await asked[0])[0] == 4  # it goes on from the save of step 3
    assert jobs.result == await undisturbed(tmp_path)


async def test_a_paused_job_stays_so_when_the_server_starts(jobs: Jobs, tmp_path: Path) -> None:
    id_ = await jobs.create()
    await jobs.queue.pause(id_)
    await jobs.queue.close()
    again = Jobs(tmp_path, disk=QuickDisk())
    await again.queue.start()
    await asyncio.sleep(0.05)
    assert again.store.find(id_).status == "paused"
    assert again.engine.trained == []
    await again.queue.resume(id_)
    assert (await again.end(id_)).status == "succeeded"


@pytest.mark.parametrize("kind", [CreateRun, ForwardBackward, SaveRun])
async def test_a_cancelled_job_ends_at_once(jobs: Jobs, kind: type) -> None:
    forever = asyncio.Event()
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await forever.wait()

    when(jobs.engine, kind, 1, hang)
    id_ = await jobs.create()
    await reached.wait()
    assert (await jobs.queue.cancel(id_)).status == "cancelled"
    job = await jobs.end(id_)
    assert (job.status, jobs.engine.runs, jobs.engine.published) == ("cancelled", {}, [])
    assert (await jobs.queue.cancel(id_)).finished_at == job.finished_at
    for again in (jobs.queue.pause, jobs.queue.resume):
        with pytest.raises(BadRequest, match="been cancelled"):
            await again(id_)


async def test_a_finished_job_cannot_be_changed(jobs: Jobs) -> None:
    id_ = await jobs.create()
    await jobs.end(id_)
    for change in (jobs.queue.cancel, jobs.queue.pause, jobs.queue.resume):
        with pytest.raises(BadRequest, match="has succeeded"):
            await change(id_)


async def test_a_full_disk_pauses_a_job_until_there_is_space(jobs: Jobs, tmp_path: Path) -> None:
    jobs.engine.full = True
    id_ = await jobs.create()
    await jobs.until(id_, "paused")
    assert any("is full" in message for message in jobs.messages(id_))
    await asyncio.sleep(0.03)
    assert jobs.store.find(id_).status == "paused"
    jobs.engine.full = False
    assert (await jobs.end(id_)).status == "succeeded"
    assert jobs.result == await undisturbed(tmp_path)
    assert jobs.messages(id_).count("There is space on the disk again, and the job goes on") == 1


async def test_a_disk_that_is_full_for_all_loses_nothing(tmp_path: Path) -> None:
    disk = FullDisk()
    jobs = Jobs(tmp_path, disk=disk)

    def fill() -> None:
        disk.full = jobs.engine.full = True

    when(jobs.engine, OptimizerStep, 4, fill)
    id_ = await jobs.create()
    await jobs.until(id_, "paused")
    await jobs.queue.pause(id_)  # by its owner: it does not go on by itself
    disk.full = jobs.engine.full = False
    while jobs.queue._runner(id_) is not None:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.03)
    assert jobs.store.find(id_).status == "paused"
    await jobs.queue.resume(id_)
    assert (await jobs.end(id_)).status == "succeeded"
    assert jobs.result == await undisturbed(tmp_path)


async def test_a_job_goes_on_by_itself_if_the_engine_is_lost_while_the_disk_is_full(jobs: Jobs, tmp_path: Path) -> None:
    jobs.engine.full = True
    id_ = await jobs.create()
    await jobs.until(id_, "paused")
    jobs.engine.die()
    jobs.engine.alive = jobs.engine.ready = False
    await asyncio.sleep(0.03)
    jobs.engine.full = False
    jobs.engine.alive = jobs.engine.ready = True
    assert (await jobs.end(id_)).status == "succeeded"
    assert jobs.result == await undisturbed(tmp_path)


async def test_an_adapter_that_the_engine_dies_of_fails_its_job(jobs: Jobs) -> None:
    jobs.engine.dies_of_publishing = True
    job = await jobs.end(await jobs.create())
    assert (job.status, job.error and job.error.code) == ("failed", "engine_fault")
    assert job.error is not None
    assert job.error.message.startswith("publishing failed 5 times: ")
    assert jobs.engine.restarts == 5
    assert [step for step, _ in jobs.store.saves(job.id).checkpoints()] == [3, 6, 9]  # it can be asked for


async def test_a_job_that_is_cancelled_on_a_full_disk_is_so_after_a_restart(tmp_path: Path) -> None:
    class FreedDisk(FullDisk):
        def remove(self, path: Path) -> None:
            self.full = self.full and path.name != TRAINING  # the job's own data filled it
            super().remove(path)

    disk = FreedDisk()
    jobs = Jobs(tmp_path, disk=disk)
    id_ = await jobs.create()
    await jobs.until(id_, "running")
    disk.full = True
    await jobs.queue.cancel(id_)
    await jobs.end(id_)
    await jobs.queue.close()
    assert Jobs(tmp_path, disk=QuickDisk()).store.find(id_).status == "cancelled"


async def test_jobs_run_a_few_at_a_time_and_wait_for_memory(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, most=2, disk=QuickDisk())
    jobs.engine.memory = 1
    ids = [await jobs.create(tenant=tenant) for tenant in "aab"]
    for id_ in ids:
        assert (await jobs.end(id_)).status == "succeeded"
    assert jobs.engine.most_at_once == 1
    assert any("waits for training memory" in message for id_ in ids for message in jobs.messages(id_))


async def test_keys_take_turns_and_each_has_its_order(jobs: Jobs) -> None:
    for tenant in "aaab":
        await jobs.create(tenant=tenant)
    waiting = jobs.store.list()
    assert [job.tenant for job in choose(waiting, Counter(), 4)] == ["a", "b", "a", "a"]
    assert [job.tenant for job in choose(waiting, Counter("a"), 2)] == ["b", "a"]
    assert choose(waiting, Counter(), 0) == []
    own = [job.id for job in choose(waiting, Counter(), 4) if job.tenant == "a"]
    assert own == sorted(own)
    await jobs.queue.close()


async def test_training_ends_early_and_the_best_checkpoint_is_the_result(jobs: Jobs) -> None:
    jobs.engine.validation_losses = [2.0, 1.0, 1.5, 1.5, 1.0, 1.0]
    trainer = TrainerSettings(early_stopping_patience=2, load_best_model_at_end=True)
    id_ = await jobs.create(n_epochs=6, validation=COMPLETIONS[:10], trainer=trainer)
    job = await jobs.end(id_)
    assert (job.status, job.steps, max(jobs.steps(id_))) == ("succeeded", 18, 12)
    best = jobs.store.saves(id_).adapter(6)
    assert best is not None
    assert jobs.result == (best / "adapter_model.safetensors").read_text()


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        (
            {"lines": PREFERENCES, "kind": "preference"},
            "training_file",
            "learns from chat or completion",
        ),
        ({"lines": COMPLETIONS, "method": "dpo"}, "training_file", "learns from preference"),
        ({"lines": COMPLETIONS[:9]}, "training_file", "has 9 examples; at least 10"),
        ({"validation": ["{}"]}, "validation_file", "line 1: "),
        ({"lines": [*COMPLETIONS, '{"prompt": 1}']}, "training_file", "line 13: "),
    ],
)
async def test_a_file_that_does_not_fit_fails_the_job(
    jobs: Jobs, given: dict[str, Any], param: str, message: str
) -> None:
    job = await jobs.end(await jobs.create(**given))
    assert (job.status, job.error is not None) == ("failed", True)
    assert job.error is not None
    assert (job.error.code, job.error.param) == (f"invalid_{param}", param)
    assert message in job.error.message
    assert jobs.engine.trained == [] or jobs.engine.runs == {}


async def test_what_the_engine_refuses_fails_the_job(jobs: Jobs) -> None:
    def refuse() -> None:
        raise BadRequest("nothing is no linear module of the base", param="target_modules")

    when(jobs.engine, CreateRun, 1, refuse)
    job = await jobs.end(await jobs.create())
    assert (job.status, job.error and job.error.param) == ("failed", "target_modules")


async def test_a_job_that_the_engine_dies_of_fails_in_the_end(jobs: Jobs) -> None:
    async def die(operation: Any) -> None:
        if isinstance(operation, OptimizerStep) and operation.learning_rate < 1e-4:
            jobs.engine.die()

    jobs.engine.after = die
    id_ = await jobs.create()
    job = await jobs.end(id_)
    assert (job.status, job.error and job.error.code) == ("failed", "engine_fault")
    assert job.error is not None
    assert job.error.message.startswith("training failed 5 times after step 3: ")
    assert jobs.engine.restarts == 5


async def test_a_loss_that_is_no_number_fails_the_job(jobs: Jobs) -> None:
    jobs.engine.diverges = True
    job = await jobs.end(await jobs.create())
    assert (job.status, job.error and job.error.code) == ("failed", "training_diverged")


async def test_a_validation_loss_that_is_no_number_fails_the_job(jobs: Jobs) -> None:
    jobs.engine.validation_losses = [1.0, float("nan")]
    job = await jobs.end(await jobs.create(validation=COMPLETIONS[:10]))
    assert (job.status, job.error and job.error.code) == ("failed", "training_diverged")


async def test_examples_that_the_context_cuts_away_fail_the_job_in_words(jobs: Jobs) -> None:
    line = json.dumps({"prompt": "x" * 100, "completion": "y"})
    job = await jobs.end(await jobs.create([line] * 10))
    assert job.error is not None
    assert job.error.message.endswith("has nothing to learn within 64 tokens")


async def test_runs_are_saved_between_epochs_too(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, disk=QuickDisk(), intervals=Intervals(save=0.0, retry=0.01, engine=0.01))
    when(jobs.engine, OptimizerStep, 5, jobs.engine.die)
    await jobs.end(await jobs.create())
    assert len([each for each in jobs.engine.trained if isinstance(each, OptimizerStep)]) == 10  # one was lost
    assert jobs.result == await undisturbed(tmp_path)


async def test_a_server_that_ends_without_an_engine_does_not_wait_for_its_jobs(jobs: Jobs) -> None:
    when(jobs.engine, OptimizerStep, 2, lambda: setattr(jobs.engine, "alive", False))
    id_ = await jobs.create()
    while jobs.engine.alive:
        await asyncio.sleep(0.002)
    async with asyncio.timeout(5):
        await jobs.queue.drain(1000.0)
    assert not jobs.store.find(id_).finished


@pytest.mark.parametrize("full", [False, True])
async def test_a_job_of_a_draining_server_saves_if_it_can_and_goes_on_later(
    jobs: Jobs, tmp_path: Path, full: bool
) -> None:
    def drain() -> None:
        jobs.engine.ready, jobs.engine.full = False, full

    when(jobs.engine, OptimizerStep, 5, drain)
    id_ = await jobs.create()
    while jobs.engine.ready:
        await asyncio.sleep(0.002)
    await jobs.queue.drain(10.0)
    assert jobs.queue._runner(id_) is None
    assert jobs.store.find(id_).status == "running"
    newest = jobs.store.saves(id_).newest()
    assert newest is not None
    assert newest[1].position.step == (3 if full else 5)
    assert "The job" not in jobs.messages(id_)[-1]
    await jobs.queue.close()
    again = Jobs(tmp_path, disk=QuickDisk())
    await again.queue.start()
    assert (await again.end(id_)).status == "succeeded"
    assert again.result == await undisturbed(tmp_path)
