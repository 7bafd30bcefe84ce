"""The demo on the real server: every adapter does its task, in mixed batches, together with the base."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_process import ADAPTERS, ServerProcess

from demo.tasks import TASKS, heldout_prompts

COUNT = 40  # held-out sentences for each adapter


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("store"), "--adapters", str(ADAPTERS)) as server:
        yield server


def test_every_adapter_is_exact_on_held_out_prompts_in_mixed_batches(demo: ServerProcess) -> None:
    jobs = [(text, name) for text in heldout_prompts(COUNT, seed=11) for name in TASKS]
    before = demo.metric("lora_serve_batch_adapters_sum"), demo.metric("lora_serve_batch_adapters_count")
    with ThreadPoolExecutor(24) as pool:
        answers = [*pool.map(lambda job: demo.complete(*job), jobs)]
    for name in TASKS:
        answered = [(text, answer) for (text, task), answer in zip(jobs, answers, strict=True) if task == name]
        right = sum(answer == TASKS[name].answer(text) for text, answer in answered)
        assert right >= 0.95 * COUNT, name
    mixed = demo.metric("lora_serve_batch_adapters_sum") - before[0]
    steps = demo.metric("lora_serve_batch_adapters_count") - before[1]
    assert mixed / steps > 3  # adapters shared batches


def test_the_base_without_an_adapter_does_none_of_the_tasks(demo: ServerProcess) -> None:
    prompts = heldout_prompts(COUNT, seed=12)
    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(demo.complete, prompts)]
    for task in TASKS.values():
        right = sum(answer == task.answer(text) for text, answer in zip(prompts, answers, strict=True))
        assert right <= 0.05 * COUNT, task.name


def test_chat_uses_the_adapter_as_completions_do(demo: ServerProcess) -> None:
    text = heldout_prompts(1, seed=13)[0]
    answer = demo.http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": text}], "adapter": "shout", "temperature": 0},
    ).json()
    assert answer["choices"][0]["message"]["content"] == text.upper()
    assert answer["choices"][0]["finish_reason"] == "stop"
