"""The openai and anthropic SDKs, sync and async, against the real server."""

from __future__ import annotations

import asyncio
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest
from anthropic import Anthropic, AsyncAnthropic
from openai import AsyncOpenAI, OpenAI
from server_process import ADAPTERS, ServerProcess, until

from demo.tasks import TASKS, heldout_prompts

TEXT = "two red foxes run home"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ADAPTERS / "reverse", source / "in-folder")
    with tarfile.open(source / "in-archive.tar.gz", "w:gz") as archive:
        archive.add(ADAPTERS / "reverse", "reverse")
    sources = (f"folders=file://{source}", f"archives=file://{source}/{{name}}.tar.gz")
    options = [word for each in sources for word in ("--adapter-source", each)]
    options += ["--adapters", str(ADAPTERS), "--served-model-name", "demo", "--training-memory", "64MiB"]
    with ServerProcess(tmp_path_factory.mktemp("store"), *options) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("name", ["in-folder", "in-archive"])
def test_an_adapter_of_a_source_is_published_when_it_is_first_asked_for(
    client: OpenAI, server: ServerProcess, name: str
) -> None:
    assert name not in [model.id for model in client.models.list()]
    answer = client.completions.create(model=name, prompt=f"{TEXT}\n", max_tokens=32, temperature=0)
    assert answer.choices[0].text == TASKS["reverse"].answer(TEXT)
    assert name in [model.id for model in client.models.list()]
    server.http.delete(f"/v1/adapters/{name}").raise_for_status()


def test_completions_with_an_adapter_in_the_body(client: OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt=f"{TEXT}\n", max_tokens=32, temperature=0, extra_body={"adapter": "reverse"}
    )
    assert answer.choices[0].text == TASKS["reverse"].answer(TEXT)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("name", TASKS)
def test_chat_with_an_adapter_as_the_model(client: OpenAI, name: str) -> None:
    answer = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": TEXT}], temperature=0, max_completion_tokens=48
    )
    assert answer.choices[0].message.content == TASKS[name].answer(TEXT)
    assert answer.model == name


def test_streams_with_usage(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="shout", messages=[{"role": "user", "content": TEXT}], temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [*stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == TEXT.upper()
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


def test_logprobs_and_copies(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=TEXT, max_tokens=4, logprobs=2, n=2, seed=1, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1] is not None


def test_models_lists_the_base_first(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", *sorted(TASKS)]
    assert client.models.retrieve("shout").id == "shout"


def test_responses_whole_and_streamed(client: OpenAI) -> None:
    for name, task in TASKS.items():
        answer = client.responses.create(model=name, input=TEXT, temperature=0, max_output_tokens=48)
        assert answer.output_text == task.answer(TEXT)
        assert (answer.status, answer.model) == ("completed", name)
    with client.responses.stream(model="shout", input=TEXT, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == TEXT.upper()
    assert final.usage is not None
    assert final.usage.total_tokens == final.usage.input_tokens + final.usage.output_tokens
    short = client.responses.create(model="shout", input=TEXT, temperature=0, max_output_tokens=2)
    assert short.status == "incomplete"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_files_of_training_data(client: OpenAI, tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT.upper()}]}
    data = tmp_path / "shout.jsonl"
    data.write_text(f"{json.dumps(line)}\n" * 20_000)
    with data.open("rb") as file:
        made = client.files.create(file=file, purpose="fine-tune")
    assert (made.filename, made.bytes, made.status) == ("shout.jsonl", data.stat().st_size, "processed")
    assert client.files.content(made.id).read() == data.read_bytes()
    assert [file.id for file in client.files.list(limit=1)] == [made.id]
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.BadRequestError, match="line 2: missing parameter: completion"):
        client.files.create(file=b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', purpose="fine-tune")


def test_errors_become_the_sdk_s_exception_classes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="demo", prompt="x", extra_body={"whatever": 1})
    assert bad.value.param == "whatever"


# --- Anthropic's -----------------------------------------------------------------------------------------------------

GREEDY = {"temperature": 0}  # which the SDK has no argument for
HI: list[anthropic.types.MessageParam] = [{"role": "user", "content": TEXT}]


@pytest.fixture
def messages(server: ServerProcess) -> Iterator[anthropic.resources.Messages]:
    with Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client.messages


@pytest.mark.parametrize("name", TASKS)
def test_messages_with_an_adapter_as_the_model(messages: anthropic.resources.Messages, name: str) -> None:
    answer = messages.create(model=f"demo:{name}", max_tokens=48, extra_body=GREEDY, messages=HI)
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": TASKS[name].answer(TEXT)}]
    assert (answer.model, answer.stop_reason) == (name, "end_turn")
    with messages.stream(model=name, max_tokens=48, extra_body=GREEDY, messages=HI) as stream:
        assert "".join(stream.text_stream) == TASKS[name].answer(TEXT)
        final = stream.get_final_message()
    assert final.usage.output_tokens == answer.usage.output_tokens
    counted = messages.count_tokens(model=name, messages=HI).input_tokens
    assert counted == final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)


def test_a_message_stops_at_a_sequence(messages: anthropic.resources.Messages) -> None:
    stopped = messages.create(
        model="shout", max_tokens=48, extra_body=GREEDY, messages=HI, stop_sequences=["FOX", "RUN"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "FOX")


def test_message_errors_become_the_sdk_s_exception_classes(messages: anthropic.resources.Messages) -> None:
    with pytest.raises(anthropic.NotFoundError, match="model nobody does not exist"):
        messages.create(model="nobody", max_tokens=5, messages=HI)
    with pytest.raises(anthropic.BadRequestError, match="unknown parameter: whatever"):
        messages.create(model="demo", max_tokens=5, messages=HI, extra_body={"whatever": 1})


async def test_message_streams_of_many_adapters_at_once(server: ServerProcess) -> None:
    async with AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as client:

        async def ask(name: str) -> str:
            async with client.messages.stream(model=name, max_tokens=48, extra_body=GREEDY, messages=HI) as stream:
                return await stream.get_final_text()

        names = [*TASKS] * 3
        answers = await asyncio.gather(*map(ask, names))
    assert answers == [TASKS[name].answer(TEXT) for name in names]


async def test_many_adapters_are_served_concurrently_with_the_async_client(server: ServerProcess) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:

        async def ask(name: str) -> str:
            pieces = await client.completions.create(
                model=name, prompt=f"{TEXT}\n", max_tokens=48, temperature=0, stream=True
            )
            return "".join([piece.choices[0].text async for piece in pieces])

        names = [*TASKS] * 4
        answers = await asyncio.gather(*map(ask, names))
    assert answers == [TASKS[name].answer(TEXT) for name in names]


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def test_a_model_is_fine_tuned_and_answers(client: OpenAI) -> None:
    prompts = heldout_prompts(17, seed=21)
    lines = [json.dumps({"prompt": f"{text}\n", "completion": "all is quiet tonight"}) for text in prompts[:16]]
    file = client.files.create(file=("quiet.jsonl", "\n".join(lines).encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="demo",
        training_file=file.id,
        suffix="quiet",
        seed=1,
        hyperparameters={"n_epochs": 8, "batch_size": 4},
        extra_body={"lora": {"r": 4}, "trainer": {"learning_rate": 0.006}},
    )
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), 60)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.error is None
    assert job.fine_tuned_model is not None
    steps = [event.data for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    assert len(steps) == 32
    assert steps[0]["train_loss"] < 0.1 * steps[-1]["train_loss"]  # type: ignore[index]
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    assert client.files.content(job.result_files[0]).text.count("\n") == 33
    for model in (job.fine_tuned_model, checkpoint):
        answer = client.completions.create(model=model, prompt=f"{prompts[16]}\n", temperature=0, max_tokens=16)
        assert answer.choices[0].text == "all is quiet tonight"
