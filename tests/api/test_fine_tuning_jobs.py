"""`/v1/fine_tuning` as OpenAI's SDK uses it, over a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_training import COMPLETIONS, CONTEXT, PREFERENCES, Jobs, TrainingApp, when
from stub_admin import StubAdminApp

from lora_serve.api.caller import Caller
from lora_serve.api.fine_tuning.event_stream import event_stream
from lora_serve.api.fine_tuning.job_records import JobEvent
from lora_serve.api.fine_tuning.job_store import UnknownJob
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.messages import AliasInfo
from lora_serve.training_messages import CreateRun, ForwardBackward, OptimizerStep, RunSettings

CALLERS = {
    "sk-a": Caller("a", admin=True, adapters=("a-*", "ft-*"), key="1"),
    "sk-b": Caller("b", admin=True, adapters=("b-*",), key="2"),
    "sk-all": Caller("root", admin=True, key="3"),
    "sk-plain": Caller("c", adapters=("a-*",), key="4"),
}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[TrainingApp]:
    keys = Keys({hash_key(key): caller for key, caller in CALLERS.items()})
    async with TrainingApp(tmp_path, keys) as app:
        yield app


async def upload(server: TrainingApp, key: str = "sk-a", lines: list[str] = COMPLETIONS) -> str:
    content = "\n".join(lines).encode()
    return (await server.sdk(key).files.create(file=("train.jsonl", content), purpose="fine-tune")).id


async def create(server: TrainingApp, key: str = "sk-a", **given: Any) -> Any:
    given.setdefault("training_file", await upload(server, key))
    extra = {"adapter": f"{CALLERS[key].name}-x"} | given.pop("extra", {})
    return await server.sdk(key).fine_tuning.jobs.create(**({"model": "base"} | given), extra_body=extra)


async def finish(server: TrainingApp, id_: str, key: str = "sk-a") -> Any:
    async with asyncio.timeout(10):
        while True:
            job = await server.sdk(key).fine_tuning.jobs.retrieve(id_)
            if job.status in ("succeeded", "failed", "cancelled"):
                return job
            await asyncio.sleep(0.01)


async def delete(server: TrainingApp, id_: str, key: str = "sk-a") -> Any:
    """Our own route: the SDK has no method for it."""
    return await server.sdk(key).delete(f"/fine_tuning/jobs/{id_}", cast_to=object)


async def checkpoint(server: TrainingApp, id_: str, key: str = "sk-a") -> Any:
    """Our own route as well: a checkpoint as soon as possible."""
    return await server.sdk(key).post(f"/fine_tuning/jobs/{id_}/checkpoints", cast_to=object)


async def refusal(call: Any, error: type[openai.APIStatusError] = openai.BadRequestError) -> tuple[str | None, str]:
    with pytest.raises(error) as refused:
        await call
    return refused.value.param, refused.value.message


async def streamed(server: TrainingApp, id_: str, **options: Any) -> list[dict[str, Any]]:
    """Events of a job until its stream ends, as SSE has them."""
    url = f"/v1/fine_tuning/jobs/{id_}/events"
    found = []
    async with server.http.stream(
        "GET", url, params={"stream": "true", **options}, headers={"Authorization": "Bearer sk-a"}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            found += [line.removeprefix("data: ")] if line else []
    assert found.pop() == "[DONE]"
    return [json.loads(each) for each in found]


async def test_a_job_s_life_with_the_sdk(server: TrainingApp) -> None:
    client = server.sdk("sk-a")
    validation = await upload(server)
    made = await create(
        server,
        validation_file=validation,
        suffix="My sums!",
        seed=7,
        metadata={"k": "v"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra={"lora": {"r": 4, "use_rslora": True, "lora_dropout": 0.1}, "max_length": 32},
    )
    assert (made.object, made.status, made.seed, made.metadata) == (
        "fine_tuning.job",
        "validating_files",
        7,
        {"k": "v"},
    )
    assert made.hyperparameters.n_epochs == 2
    assert made.hyperparameters.batch_size == made.hyperparameters.learning_rate_multiplier == "auto"
    assert (made.lora["r"], made.lora["use_rslora"], made.lora["seed"], made.max_length) == (4, True, 7, 32)
    assert made.peft == made.lora | {"peft_type": "LORA"}
    job = await finish(server, made.id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.fine_tuned_model == f"ft:base:a:My sums!:{job.id[-10:]}"
    assert (job.hyperparameters.batch_size, job.hyperparameters.learning_rate_multiplier) == (4, 1.0)
    assert job.method.supervised.hyperparameters.n_epochs == 2
    assert job.trained_tokens > 0
    assert job.finished_at >= job.created_at
    assert job.integrations == []
    table = (await client.files.content(job.result_files[0])).text
    assert table.startswith("step,train_loss,")
    assert [each.purpose async for each in client.files.list(purpose="fine-tune-results")] == ["fine-tune-results"]
    events = [each async for each in client.fine_tuning.jobs.list_events(job.id, limit=3)]
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert len({each.id for each in events}) == len(events)
    metrics = [each.data for each in events if each.type == "metrics"]
    assert [each["step"] for each in metrics] == [6, 5, 4, 3, 2, 1]  # type: ignore[index]
    checkpoints = [each async for each in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
    assert [each.step_number for each in checkpoints] == [6, 3]
    assert checkpoints[0].metrics.full_valid_loss == 1.0
    assert checkpoints[0].metrics.train_mean_token_accuracy == 1.0
    assert checkpoints[0].metrics.valid_mean_token_accuracy == 1.0
    assert checkpoints[0].metrics.full_valid_mean_token_accuracy == 1.0
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-6"


async def test_the_name_of_the_result_is_a_model(server: TrainingApp) -> None:
    made = await create(server, hyperparameters={"n_epochs": 1}, extra={"adapter": "a-x"})
    job = await finish(server, made.id)
    client = server.sdk("sk-plain")
    assert (await client.models.retrieve(job.fine_tuned_model)).id == "a-x"
    checkpoint = f"{job.fine_tuned_model}:ckpt-step-3"
    published = f"a-x-{job.id[-10:]}-step-3"
    assert published not in server.engine.adapters
    assert (await client.models.retrieve(checkpoint)).id == published  # published when it was asked for
    before = len(server.engine.published)
    await client.models.retrieve(checkpoint)
    assert len(server.engine.published) == before
    for wrong in (f"{job.fine_tuned_model}:ckpt-step-1", job.fine_tuned_model.replace("base", "other"), "ft:x"):
        await refusal(client.models.retrieve(wrong), openai.NotFoundError)
    for name in (job.fine_tuned_model, checkpoint):  # b may use neither
        hidden = await refusal(server.sdk("sk-b").models.retrieve(name), openai.NotFoundError)
        assert f"model {name} does not exist" in hidden[1]  # and not what it stands for
    del server.engine.adapters[published]
    await refusal(server.sdk("sk-b").models.retrieve(checkpoint), openai.NotFoundError)
    assert published not in server.engine.adapters


async def test_a_checkpoint_that_was_asked_for_is_listed_and_a_model(server: TrainingApp) -> None:
    asked = asyncio.Event()
    when(server.engine, OptimizerStep, 1, asked.wait)
    id_ = (await create(server, hyperparameters={"n_epochs": 1})).id
    while (await server.sdk("sk-a").fine_tuning.jobs.retrieve(id_)).status != "running":
        assert "not in training" in (await refusal(checkpoint(server, id_)))[1]
        await asyncio.sleep(0.01)
    asking = asyncio.create_task(checkpoint(server, id_))
    await asyncio.sleep(0.05)
    asked.set()
    made = await asking
    assert (made["object"], made["step_number"]) == ("fine_tuning.job.checkpoint", 1)
    await finish(server, id_)
    client = server.sdk("sk-a")
    listed = [each async for each in client.fine_tuning.jobs.checkpoints.list(id_)]
    assert [each.step_number for each in listed] == [3, 1]
    assert listed[1].id == made["id"]
    name = (await client.models.retrieve(made["fine_tuned_model_checkpoint"])).id
    assert name == f"a-x-{id_[-10:]}-step-1"
    assert "not in training" in (await refusal(checkpoint(server, id_)))[1]


async def test_a_job_without_a_name_makes_an_adapter_of_its_own(server: TrainingApp) -> None:
    training = await upload(server, "sk-all")
    client = server.sdk("sk-all").fine_tuning.jobs
    made = await client.create(model="base", training_file=training, suffix="My sums! 2")
    job = await finish(server, made.id, "sk-all")
    assert job.adapter.startswith(f"My-sums-2-{job.id[-10:]}@")
    again = await client.create(model="base", training_file=training, hyperparameters={"n_epochs": 1})
    assert (await finish(server, again.id, "sk-all")).adapter.startswith("ft-")
    assert again.seed != job.seed


async def test_a_job_is_seen_by_its_own_key_and_by_who_administers_all(server: TrainingApp) -> None:
    mine, other = await create(server), await create(server, "sk-b")
    for key, seen in (("sk-a", [mine.id]), ("sk-b", [other.id]), ("sk-all", [other.id, mine.id])):
        assert [each.id async for each in server.sdk(key).fine_tuning.jobs.list()] == seen
    jobs = server.sdk("sk-b").fine_tuning.jobs
    calls = (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list)
    calls += (partial(delete, server, key="sk-b"), partial(checkpoint, server, key="sk-b"))
    for call in calls:
        hidden = await refusal(call(mine.id), openai.NotFoundError)
        unknown = await refusal(call("ftjob-0"), openai.NotFoundError)
        assert hidden[1].replace(mine.id, "ftjob-0") == unknown[1]
    await refusal(server.sdk("sk-plain").fine_tuning.jobs.retrieve(mine.id), openai.PermissionDeniedError)
    assert (await finish(server, mine.id)).status == "succeeded"
    await finish(server, other.id, "sk-b")


async def test_lists_are_pages_and_select_by_metadata(server: TrainingApp) -> None:
    ids = [(await create(server, metadata={"n": str(number % 2)} if number else None)).id for number in range(5)]
    jobs = server.sdk("sk-a").fine_tuning.jobs
    assert [each.id async for each in jobs.list(limit=2)] == ids[::-1]
    assert [each.id async for each in jobs.list(metadata={"n": "1"})] == [ids[3], ids[1]]
    assert [each.id async for each in jobs.list(extra_query={"metadata": "null"})] == [ids[0]]
    for id_ in ids:
        await finish(server, id_)


async def test_pause_resume_and_cancel(server: TrainingApp) -> None:
    jobs = server.sdk("sk-a").fine_tuning.jobs
    id_ = (await create(server)).id
    assert (await jobs.pause(id_)).status == (await jobs.pause(id_)).status == "paused"
    assert (await jobs.resume(id_)).status in ("validating_files", "queued", "running")
    assert (await jobs.resume(id_)).status in ("validating_files", "queued", "running")
    assert (await jobs.cancel(id_)).status == (await jobs.cancel(id_)).status == "cancelled"
    assert "has been cancelled" in (await refusal(jobs.pause(id_)))[1]
    done = (await create(server)).id
    await finish(server, done)
    for call in (jobs.cancel, jobs.pause, jobs.resume):
        assert "has succeeded" in (await refusal(call(done)))[1]


async def test_a_finished_job_can_be_deleted(server: TrainingApp) -> None:
    id_ = (await create(server)).id
    assert "cancel it first" in (await refusal(delete(server, id_)))[1]
    job = await finish(server, id_)
    assert await delete(server, id_) == {"id": id_, "object": "fine_tuning.job", "deleted": True}
    await refusal(delete(server, id_), openai.NotFoundError)
    jobs = server.sdk("sk-a").fine_tuning.jobs
    await refusal(jobs.list_events(id_), openai.NotFoundError)
    assert (await jobs.list()).data == []
    await refusal(server.sdk("sk-a").models.retrieve(job.fine_tuned_model), openai.NotFoundError)
    assert (await server.sdk("sk-a").models.retrieve("a-x")).id == "a-x"  # which it published


async def test_jobs_are_counted_by_status(server: TrainingApp) -> None:
    await finish(server, (await create(server)).id)
    await server.sdk("sk-a").fine_tuning.jobs.cancel((await create(server)).id)
    metrics = (await server.http.get("/metrics", headers={"Authorization": "Bearer sk-all"})).text
    counts = {"succeeded": 1, "cancelled": 1, "failed": 0, "queued": 0}
    for status, count in counts.items():
        assert f'lora_serve_fine_tuning_jobs{{status="{status}"}} {count}.0' in metrics


async def test_a_job_that_trains_has_metrics_of_its_own(server: TrainingApp) -> None:
    seen: list[str] = []

    async def after(operation: Any) -> None:
        if isinstance(operation, OptimizerStep):
            seen.append((await server.http.get("/metrics", headers={"Authorization": "Bearer sk-all"})).text)

    server.engine.after = after
    made = await create(server, validation_file=await upload(server), hyperparameters={"n_epochs": 2, "batch_size": 4})
    await finish(server, made.id)
    labels = f'{{adapter="a-x",fine_tuning_job="{made.id}"}}'
    assert f"lora_serve_fine_tuning_job_step{labels} 0.0" in seen[0]
    assert "_train_loss{" not in seen[0]
    told = [each["data"] for each in await streamed(server, made.id) if each["type"] == "metrics"]
    values = {"step": 4, "steps": 6, "tokens": told[3]["trained_tokens"], "train_loss": told[3]["train_loss"]}
    for name, value in {**values, "valid_loss": told[2]["valid_loss"]}.items():
        assert f"lora_serve_fine_tuning_job_{name}{labels} {float(value)}\n" in seen[4], name
    metrics = (await server.http.get("/metrics", headers={"Authorization": "Bearer sk-all"})).text
    assert made.id not in metrics


async def test_events_are_streamed_until_the_job_has_finished(server: TrainingApp) -> None:
    made = await create(server)
    events = await streamed(server, made.id)
    listed = [each.to_dict() async for each in server.sdk("sk-a").fine_tuning.jobs.list_events(made.id)]
    assert events == listed[::-1]
    assert events[-1]["message"] == "The job has successfully completed"
    assert await streamed(server, made.id, after=events[2]["id"]) == events[3:]
    assert await streamed(server, made.id, after=events[-1]["id"]) == []


async def test_a_stream_of_events_has_them_as_they_happen_and_ends_with_the_server(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    reached = asyncio.Event()

    async def after(operation: Any) -> None:
        if isinstance(operation, OptimizerStep):
            reached.set()
            await asyncio.Event().wait()

    jobs.engine.after = after
    id_ = await jobs.create()
    stream = event_stream(jobs.queue, id_, None, poll=0.005)
    await reached.wait()
    assert (await anext(stream))["message"] == f"Created fine-tuning job: {id_}"
    jobs.store.tell(id_, JobEvent(5, "info", "now"))
    seen = []
    async with asyncio.timeout(5):
        async for each in stream:
            seen.append(each["message"])
            if each["message"] == "now":
                closing = asyncio.ensure_future(jobs.queue.close())
    await closing
    assert seen[-1] == "now"


async def test_a_stream_of_a_job_that_is_deleted_says_so(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    id_ = await jobs.create()
    await jobs.end(id_)
    stream = event_stream(jobs.queue, id_, None)
    await anext(stream)
    await jobs.queue.delete(id_)
    with pytest.raises(UnknownJob):
        [each async for each in stream]


async def test_dpo_shows_its_beta(server: TrainingApp) -> None:
    training = await upload(server, lines=PREFERENCES)
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}}
    made = await create(server, training_file=training, method=method)
    job = await finish(server, made.id)
    assert job.error is None
    assert job.method.dpo.hyperparameters.beta == 0.3
    assert job.hyperparameters.n_epochs == 1


async def test_a_file_that_does_not_fit_fails_the_job(server: TrainingApp) -> None:
    made = await create(server, training_file=await upload(server, lines=COMPLETIONS[:3]))
    job = await finish(server, made.id)
    assert (job.status, job.fine_tuned_model, job.result_files) == ("failed", None, [])
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    events = (await server.sdk("sk-a").fine_tuning.jobs.list_events(made.id)).data
    assert events[0].level == "error"


P_TUNING: dict[str, Any] = {"peft_type": "P_TUNING", "num_virtual_tokens": 8}


async def test_a_job_trains_any_method_and_leaves_room_for_its_virtual_tokens(server: TrainingApp) -> None:
    asked = P_TUNING | {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 24}
    long = [json.dumps({"prompt": "x" * 20, "completion": "y" * 50})] * 10
    made = await create(server, training_file=await upload(server, lines=long), seed=3, extra={"peft": asked})
    settings = {"encoder_num_layers": 2, "encoder_dropout": 0, "seed": 3}
    assert (made.lora, made.peft) == (None, asked | settings)
    job = await finish(server, made.id)
    assert (job.status, job.error) == ("succeeded", None)
    (created,) = (each for each in server.engine.trained if isinstance(each, CreateRun))
    assert created.settings == RunSettings(**(asked | {"seed": 3}))
    passes = [each for each in server.engine.trained if isinstance(each, ForwardBackward)]
    assert {len(example.tokens) + 8 for each in passes for example in each.examples} == {CONTEXT - 1}


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"training_file": "file-1"}, "training_file", "file file-1 does not exist"),
        ({"validation_file": "file-2"}, "validation_file", "file file-2 does not exist"),
        ({"model": "gpt-4o"}, "model", "cannot be fine-tuned here; base can"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method", "graders is not supported"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "wandb"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", ""),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", "unknown"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "in dpo"),
        ({"method": {"type": "dpo"}, "hyperparameters": {}}, None, "send them in method"),
        ({"suffix": "x" * 65}, "suffix", ""),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", ""),
        ({"extra": {"lora": {"rank": 4}}}, "lora.rank", "unknown"),
        ({"extra": {"lora": {"init_lora_weights": "eva"}}}, "lora.init_lora_weights", ""),
        ({"extra": {"peft": {"peft_type": "LOHA"}}}, "peft", "P_TUNING"),
        ({"extra": {"peft": {"num_virtual_tokens": 4}}}, "peft", "peft_type"),
        ({"extra": {"peft": {"peft_type": "P_TUNING"}}}, "peft.num_virtual_tokens", "missing"),
        ({"extra": {"peft": P_TUNING | {"r": 4}}}, "peft.r", "unknown"),
        ({"extra": {"peft": P_TUNING | {"encoder_hidden_size": 10**9}}}, "peft.encoder_hidden_size", "65536"),
        ({"extra": {"peft": P_TUNING | {"encoder_num_layers": 10**6}}}, "peft.encoder_num_layers", "4"),
        ({"extra": {"peft": P_TUNING | {"encoder_dropout": 0.1}}}, "peft.encoder_dropout", "0"),
        ({"extra": {"peft": P_TUNING | {"num_virtual_tokens": 63}}}, "peft.num_virtual_tokens", "of the context"),
        ({"extra": {"peft": P_TUNING, "lora": {}}}, None, "send one of them"),
        ({"extra": {"peft": P_TUNING}, "method": {"type": "dpo"}}, None, "dpo learns against the base"),
        ({"extra": {"trainer": {"load_best_model_at_end": True}}}, None, "need a validation_file"),
        ({"extra": {"learning_rate": 1}}, "learning_rate", "unknown"),
        ({"extra": {"adapter": "a b"}}, "adapter", ""),
    ],
)
async def test_what_cannot_be_is_refused_at_once(
    server: TrainingApp, given: dict[str, Any], param: str | None, message: str
) -> None:
    found = await refusal(create(server, **given))
    assert found[0] == param or param is None, found
    assert message in found[1]
    assert [each async for each in server.sdk("sk-a").fine_tuning.jobs.list()] == []


async def test_an_adapter_is_the_key_s_own(server: TrainingApp) -> None:
    assert (await refusal(create(server, extra={"adapter": "b-x"}), openai.PermissionDeniedError))[0] == "adapter"
    with pytest.raises(openai.ConflictError):
        await create(server, "sk-all", extra={"adapter": "base"})
    server.engine.aliases["a-alias"] = AliasInfo("a-alias", [], None, "tag", 1.0)
    with pytest.raises(openai.ConflictError, match="a-alias is an alias"):
        await create(server, extra={"adapter": "a-alias"})
    hidden = await upload(server, "sk-b")
    assert "does not exist" in (await refusal(create(server, training_file=hidden)))[1]


async def test_permissions_are_refused_in_words(server: TrainingApp) -> None:
    permissions = server.sdk("sk-a").fine_tuning.checkpoints.permissions
    name = "ft:base:a::0123456789:ckpt-step-1"
    for call in (
        permissions.create(name, project_ids=["p"]),
        permissions.list(name),
        permissions.delete("cp_1", fine_tuned_model_checkpoint=name),
    ):
        assert "no projects" in (await refusal(call))[1]


async def test_without_training_every_route_says_how_to_turn_it_on(tmp_path: Path) -> None:
    server = StubAdminApp(tmp_path)
    for method, path in (
        ("POST", ""), ("GET", ""), ("GET", "/x"), ("POST", "/x/cancel"), ("POST", "/x/pause"), ("POST", "/x/resume"),
        ("GET", "/x/events"), ("GET", "/x/checkpoints"), ("DELETE", "/x"), ("POST", "/x/checkpoints"),
    ):  # fmt: skip
        body = {"model": "base", "training_file": "file-1"} if (method, path) == ("POST", "") else None
        answer = await server.ask(method, f"/v1/fine_tuning/jobs{path}", json=body)
        assert answer.status_code == 400
        assert "--training-memory" in answer.json()["error"]["message"]
